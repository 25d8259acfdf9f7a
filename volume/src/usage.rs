//! What a volume keeps in the pool, by its table.

use backends::ReducedUsage;

use crate::segment::BLOCK;
use crate::table::{Content, Table};

impl Table {
    /// Of the volume's own objects; what belongs to ancestors is theirs.
    pub(crate) fn usage(&self) -> ReducedUsage {
        let mut usage = ReducedUsage::default();
        for (_, entry) in self.used().filter(|(_, entry)| entry.owner == 0 && entry.is_live()) {
            match entry.content {
                Content::Data => {
                    usage.unique += u64::from(entry.blocks) * BLOCK as u64;
                    usage.compressed += u64::from(entry.bytes);
                }
                Content::Pages => usage.map += u64::from(entry.bytes),
            }
        }
        usage
    }
}
