//! What is made once and kept: each product has a stamp beside it with the text of its recipe, and a changed recipe makes it anew.

use super::Outcome;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Runs `build` unless `product` is there, made by this very recipe.
pub fn make(product: &Path, recipe: &str, build: impl FnOnce() -> Result<()>) -> Result<Outcome> {
    let stamp = stamp_of(product);
    if product.exists() && fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == recipe) {
        return Ok(Outcome::AlreadyThere);
    }
    forget(product)?;
    build().with_context(|| format!("making {}", product.display()))?;
    fs::write(&stamp, recipe).with_context(|| format!("writing {}", stamp.display()))?;
    Ok(Outcome::Installed)
}

/// Has a product made anew.
pub fn forget(product: &Path) -> Result<()> {
    let stamp = stamp_of(product);
    match fs::remove_file(&stamp) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", stamp.display()))
        }
        _ => Ok(()),
    }
}

fn stamp_of(product: &Path) -> PathBuf {
    product.with_extension("recipe")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_built_once_per_recipe() {
        let folder = tempfile::tempdir().unwrap();
        let product = folder.path().join("product");
        let build = || Ok(fs::write(&product, "made")?);
        assert_eq!(make(&product, "one", build).unwrap(), Outcome::Installed);
        assert_eq!(make(&product, "one", || unreachable!()).unwrap(), Outcome::AlreadyThere);
        assert_eq!(make(&product, "two", build).unwrap(), Outcome::Installed);
        fs::remove_file(&product).unwrap();
        assert_eq!(make(&product, "two", build).unwrap(), Outcome::Installed);
        assert!(make(&product, "three", || anyhow::bail!("broken")).is_err());
        assert_eq!(make(&product, "two", build).unwrap(), Outcome::Installed, "a failed build is not kept");
    }
}
