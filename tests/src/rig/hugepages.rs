//! Reserves 2 MiB huge pages for a guest, and gives them back on drop.

use anyhow::{Context, Result, bail};
use std::fs;

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const PAGE_MIB: u64 = 2;

#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    pub fn reserve(memory_mib: u64) -> Result<Self> {
        let before = pool_size()?;
        let wanted = before + memory_mib.div_ceil(PAGE_MIB);
        let reserved = Self { before };
        fs::write(POOL, wanted.to_string()).with_context(|| format!("writing {POOL} (needs root)"))?;
        let got = pool_size()?;
        if got < wanted {
            bail!("only {got} of {wanted} huge pages could be reserved: free some memory");
        }
        Ok(reserved)
    }
}

fn pool_size() -> Result<u64> {
    let text = fs::read_to_string(POOL).with_context(|| format!("reading {POOL}"))?;
    text.trim().parse().with_context(|| format!("{POOL} holds {text:?}"))
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Failing to shrink the pool wastes memory and harms nothing else.
        let _ = fs::write(POOL, self.before.to_string());
    }
}
