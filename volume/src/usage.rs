//! What a volume keeps in the pool, by its table, and what it has done since it was opened.

use std::time::Duration;

use backends::{Collected, Destaged, EngineUse, LogUse, ReducedUsage};

use crate::core::Core;
use crate::segment::BLOCK;
use crate::table::{Content, Table};

/// Writes are noted so often.
const NOTE_EVERY: Duration = Duration::from_secs(1);

/// When a write came, and the position in the log that it came after.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WrittenAt {
    position: u64,
    time: Duration,
}

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

impl Core {
    pub(crate) fn engine_use(&self) -> EngineUse {
        let (used, size) = self.log.used();
        let (tally, block) = (&self.reader.tally, BLOCK as u64);
        let now = self.chain.environment.now();
        EngineUse {
            log: LogUse { used, size, lag: self.lag(now) },
            reduced: self.reader.table.borrow().usage(),
            index: self.deduplication.pinned_bytes() as u64,
            destaged: Destaged {
                logical: tally.blocks.get() * block,
                duplicate: tally.hits.get() * block,
                stored: tally.stored_bytes.get(),
            },
            collected: Collected {
                moved: tally.blocks_moved.get() * block,
                freed: tally.bytes_freed.get(),
                is_running: self.collecting.get(),
            },
            waits: self.chain.troubles.worst_of_pool(now).map_or(Duration::ZERO, |trouble| now.saturating_sub(trouble.since)),
        }
    }

    /// A write is about to be logged.
    pub(crate) fn note_write(&self) {
        let time = self.chain.environment.now();
        let is_due = |last: &WrittenAt| time.saturating_sub(last.time) >= NOTE_EVERY;
        if self.written_at.borrow().back().is_none_or(is_due) {
            self.forget_written();
            self.written_at.borrow_mut().push_back(WrittenAt { position: self.backlog.end().position, time });
        }
    }

    /// How long the oldest write that the pool has not got yet has waited, to a second.
    fn lag(&self, now: Duration) -> Duration {
        if self.published.get() >= self.backlog.end().position {
            return Duration::ZERO;
        }
        self.forget_written();
        self.written_at.borrow().front().map_or(Duration::ZERO, |oldest| now.saturating_sub(oldest.time))
    }

    /// Drops notes of writes that the pool has.
    fn forget_written(&self) {
        let mut notes = self.written_at.borrow_mut();
        while notes.get(1).is_some_and(|next| next.position <= self.published.get()) {
            notes.pop_front();
        }
    }
}
