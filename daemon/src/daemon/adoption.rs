//! Files, devices and images of others that become volumes.

use std::path::{Path, PathBuf};

use super::Daemon;
use crate::api::types::{VolumeAdopt, VolumeInfo};
use crate::config::Address;
use crate::error::{Error, Result};
use crate::names::VolumeId;

impl Daemon {
    pub fn adopt_volume(&self, request: &VolumeAdopt) -> Result<VolumeInfo> {
        let pool = self.pools.get(&request.pool)?;
        let name = match &request.name {
            Some(name) => name.clone(),
            None => name_after(&request.object)?,
        };
        backends::check_name("volume", &name)?;
        let id = VolumeId::new(&request.pool, &name);
        let _held = self.hold([&id]);
        if pool.driver() == "file" {
            self.ensure_adoptable(&name, &request.object)?;
        }
        let record = pool.adopt(&request.object, &name)?;
        Ok(self.volume_info(&request.pool, record))
    }

    /// Who comes by TCP is not the daemon's user, with whose rights the file is opened.
    fn ensure_adoptable(&self, volume: &str, object: &str) -> Result<()> {
        let config = self.config();
        if !matches!(config.daemon.admin_address(), Ok(Address::Tcp { .. })) {
            return Ok(());
        }
        let path = Path::new(object).canonicalize();
        let inside =
            |folder: &PathBuf| folder.canonicalize().is_ok_and(|folder| path.as_ref().is_ok_and(|path| path.starts_with(folder)));
        if config.daemon.adopt_dirs.iter().any(inside) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "volume {volume}: adopting {object} refused: it is in no folder that may be adopted from through the admin API on TCP; add its folder to [daemon].adopt_dirs"
        )))
    }
}

/// A volume name made from the last part of an object's name.
fn name_after(object: &str) -> Result<String> {
    let last = object.rsplit('/').next().unwrap_or(object);
    let stem = last.strip_suffix(".raw").or_else(|| last.strip_suffix(".img")).unwrap_or(last);
    let name = stem.to_ascii_lowercase();
    match backends::check_name("volume", &name) {
        Ok(()) => Ok(name),
        Err(_) => Err(Error::invalid(format!(
            "{object:?} gives no good volume name: name it, `novastor volume adopt POOL/OBJECT NAME`"
        ))),
    }
}
