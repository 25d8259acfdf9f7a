//! A log whose disk has no space, or whose ring is full because the pool has none.
//!
//! ```text
//!   wait:    no space ─▶ the same bytes once more, and once more ─▶ written, acknowledged in order
//!   error:   no space ─▶ nothing is under way any more ─▶ taken back, refused ─▶ there is space where it was to be ─▶ goes on
//! ```
//!
//! Invariants: what was acknowledged stays, can be read and is made durable as ever. What was refused is never found later, by a reader or by a recovery:
//! the headers of its batches are gone, durably, before anybody hears of it. Only writes are treated so: a sync that fails is a failure, whatever its errno.

use std::rc::Rc;
use std::time::Duration;

use blockdev::Errno;

use super::{BatchState, Encryption, Failure, Log, ToWrite, behead, encrypt_from};
use crate::troubles::Cause;

const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long what waits may wait for a pool that has no space, before it is refused.
const GRACE: Duration = Duration::from_millis(250);

/// What becomes of writes for which there is no space: in the pool while the log is full, or on the log's own disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WhenFull {
    /// They wait until there is.
    #[default]
    Wait,
    /// They fail with ENOSPC.
    Error,
}

impl Log {
    /// Writes a batch that is under way. While its disk is full it is tried again, or refused.
    pub(super) async fn write_batch(self: Rc<Self>, ToWrite { number, offset, parts }: ToWrite) {
        let attempt = self.troubles.attempt();
        let mut pause = PAUSE_FIRST;
        while self.failed.get().is_none() {
            match self.disk.write(offset, parts.clone()).await {
                Ok(()) => return self.written(number),
                Err(errno) if !errno.is_no_space() => return self.fail_with(Failure::io("write", offset, errno)),
                Err(_) if self.when_full == WhenFull::Error => return self.refuse(number),
                Err(errno) => {
                    attempt.failed(self.environment.now(), Cause::LogDisk(errno));
                    self.pause(&mut pause).await;
                }
            }
        }
    }

    /// There was no space for a batch. It, and all that has to come after it, is taken back.
    fn refuse(self: &Rc<Self>, number: u64) {
        self.set_state(number, BatchState::Refused);
        self.changed.notify();
        if !self.refuses.replace(true) {
            self.environment.spawn(Box::pin(self.clone().refuse_until_there_is_space()));
        }
    }

    async fn refuse_until_there_is_space(self: Rc<Self>) {
        let attempt = self.troubles.attempt();
        attempt.failed(self.environment.now(), Cause::LogDisk(Errno::ENOSPC));
        self.changed.wait_for(|| (!self.is_under_way()).then_some(())).await;
        let first = self.in_flight.borrow().front().map(|batch| batch.header.clone());
        // The log has failed otherwise.
        let Some(first) = first else { return };
        let (offset, len) = (self.ring.offset(first.position), first.total_len(self.ring.sector));
        let mut pause = PAUSE_FIRST;
        while let Err(failure) = self.take_back().await {
            match failure {
                // Some file systems need space to write over what is there. Nobody was told of anything yet.
                Failure::Io { operation: "write", errno, .. } if errno.is_no_space() => self.pause(&mut pause).await,
                failure => return self.fail_with(failure),
            }
        }
        loop {
            self.pause(&mut pause).await;
            if self.failed.get().is_some() {
                return;
            }
            // Where the first of them was to be, zeroes are as good as anything.
            match self.disk.write(offset, vec![vec![0; len].into()]).await {
                Ok(()) => break,
                Err(errno) if errno.is_no_space() => {}
                Err(errno) => return self.fail_with(Failure::io("write", offset, errno)),
            }
        }
        self.refuses.set(false);
        self.changed.notify();
    }

    fn is_under_way(&self) -> bool {
        self.in_flight.borrow().iter().any(|batch| batch.state == BatchState::UnderWay)
    }

    /// Takes back what is not in the log as a whole, what is there and comes after it, and what waits; then tells who asked for it.
    async fn take_back(&self) -> Result<(), Failure> {
        let positions: Vec<u64> = self.in_flight.borrow().iter().map(|batch| batch.header.position).collect();
        let mut was_there = false;
        for position in positions {
            was_there |= behead(&*self.disk, self.ring, self.log_id, position).await?;
        }
        if was_there {
            self.disk.sync().await.map_err(Failure::sync)?;
        }
        let in_flight = std::mem::take(&mut *self.in_flight.borrow_mut());
        self.next.set(self.acknowledged.get());
        self.marked.set(0);
        self.encrypt_anew();
        in_flight.into_iter().flat_map(|batch| batch.asked).for_each(|asked| asked.give(Err(Errno::ENOSPC)));
        self.refuse_queued();
        Ok(())
    }

    fn refuse_queued(&self) {
        let queued = std::mem::take(&mut *self.queue.borrow_mut());
        queued.into_iter().for_each(|queued| queued.asked.give(Err(Errno::ENOSPC)));
        self.changed.notify();
    }

    /// The numbers of batches that were taken back are given again.
    fn encrypt_anew(&self) {
        let mut encryption = self.encryption.borrow_mut();
        if let Some(Encryption { cipher, .. }) = &*encryption {
            let anew = encrypt_from(cipher.clone(), self.epoch, self.next.get().number, &*self.environment);
            *encryption = Some(anew);
        }
    }

    /// Refuses what waits for room in the ring while the pool has no space, to the end of the log.
    pub(super) async fn refuse_what_is_stuck(self: Rc<Self>) {
        loop {
            let stuck = || (self.is_stuck.get() || self.failed.get().is_some()).then_some(());
            self.changed.wait_for(stuck).await;
            if self.failed.get().is_some() {
                return;
            }
            self.environment.sleep(GRACE).await;
            if self.is_stuck.get() && self.troubles.is_pool_full() {
                self.refuse_queued();
            }
        }
    }

    async fn pause(&self, pause: &mut Duration) {
        self.environment.sleep(*pause).await;
        *pause = (*pause * 2).min(PAUSE_MAX);
    }
}
