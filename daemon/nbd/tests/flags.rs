//! What reaches the device of each flag that a client may set.

mod common;

use std::rc::Rc;
use std::sync::Arc;

use blockdev::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue, Op, Reactor, Request};
use common::{Answer, Rig, memory};
use nbd::protocol::{Headers, command, command_flag};
use parking_lot::Mutex;

type Seen = Arc<Mutex<Vec<Op>>>;

/// A disk that notes what it is asked for.
struct Recording {
    disk: Arc<dyn BlockDevice>,
    fua: bool,
    seen: Seen,
}

impl BlockDevice for Recording {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { fua: self.fua, ..self.disk.capabilities() }
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(RecordingQueue { below: self.disk.open_queue(reactor)?, seen: self.seen.clone() }))
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.disk.resize(size)
    }
}

struct RecordingQueue {
    below: Box<dyn IoQueue>,
    seen: Seen,
}

impl IoQueue for RecordingQueue {
    fn submit(&self, request: Request) {
        self.seen.lock().push(request.op);
        self.below.submit(request);
    }
}

#[test]
fn each_flag_reaches_the_device() {
    let zeroes = |unmap, fast| Op::WriteZeroes { unmap, fua: false, fast };
    for fua in [true, false] {
        let seen = Seen::default();
        let rig = Rig::new(Arc::new(Recording { disk: memory(1 << 20), fua, seen: seen.clone() }));
        let mut wire = rig.attach(Headers::Structured);
        let durable_write = if fua { vec![Op::Write { fua: true }] } else { vec![Op::Write { fua: false }, Op::Flush] };
        for (command, flags, expected) in [
            (command::WRITE, 0, vec![Op::Write { fua: false }]),
            (command::WRITE, command_flag::FUA, durable_write),
            (command::WRITE_ZEROES, 0, vec![zeroes(true, false)]),
            (command::WRITE_ZEROES, command_flag::FUA, vec![zeroes(true, false), Op::Flush]),
            (command::WRITE_ZEROES, command_flag::NO_HOLE, vec![zeroes(false, false)]),
            (command::WRITE_ZEROES, command_flag::FAST_ZERO, vec![zeroes(true, true)]),
            (command::TRIM, 0, vec![Op::Discard]),
            (command::TRIM, command_flag::FUA, vec![Op::Discard, Op::Flush]),
        ] {
            let cookie = match command {
                command::WRITE => wire.write(flags, 0, &[1; 4096]),
                _ => wire.request(command, flags, 0, 4096),
            };
            assert_eq!(wire.answer(), (cookie, Answer::Done));
            assert_eq!(std::mem::take(&mut *seen.lock()), expected, "command {command}, flags {flags}, FUA {fua}");
        }
        wire.disconnect();
    }
}
