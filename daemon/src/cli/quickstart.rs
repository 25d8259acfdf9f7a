//! `novastor quickstart`.

use super::Context;
use super::arguments::Quickstart;

pub fn run(_context: &Context, _command: &Quickstart) -> anyhow::Result<()> {
    Err(anyhow::anyhow!("not wired yet"))
}
