//! `novastor doctor`.

use std::path::Path;

use super::Context;

pub fn run(_context: &Context, _config: Option<&Path>) -> anyhow::Result<()> {
    Err(anyhow::anyhow!("not wired yet"))
}
