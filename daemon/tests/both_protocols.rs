//! One volume over NBD and vhost-user-blk at once.

mod common;
#[path = "../vhost-user/tests/device/frontend.rs"]
#[allow(dead_code, reason = "only a part of it is needed here")]
mod frontend;
#[path = "../nbd/tests/common/mod.rs"]
mod nbd_rig;

use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;

use blockdev::memory_disk::MemoryDisk;
use blockdev::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue, Op, Reactor, Request};
use frontend::{Data, Frontend, Queue, T_FLUSH, T_OUT};
use nbd::protocol::{Headers, command};
use nbd_rig::{Answer, Rig, Wire};
use parking_lot::Mutex;
use vhost_user_blk::{ExportOptions, VhostUserExport};

const SIZE: usize = 64 << 10;

/// A disk that keeps what it was told to flush, and nothing else.
struct Forgetful {
    disk: MemoryDisk,
    kept: Arc<Kept>,
}

struct Kept {
    /// As clients see it.
    content: Mutex<Vec<u8>>,
    /// As it would be after a loss of power.
    durable: Mutex<Vec<u8>>,
}

impl BlockDevice for Forgetful {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { fua: false, flush_failure_loses_writes: true, ..self.disk.capabilities() }
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(ForgetfulQueue { below: self.disk.open_queue(reactor)?, kept: self.kept.clone() }))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.disk.resize(size)
    }
}

struct ForgetfulQueue {
    below: Box<dyn IoQueue>,
    kept: Arc<Kept>,
}

impl IoQueue for ForgetfulQueue {
    fn submit(&self, request: Request) {
        match (request.op, request.payload.memory()) {
            (Op::Write { .. }, Some(memory)) => {
                let at = request.offset as usize;
                self.kept.content.lock()[at..at + memory.len()].copy_from_slice(&memory.to_vec());
            }
            (Op::Flush, _) => *self.kept.durable.lock() = self.kept.content.lock().clone(),
            _ => {}
        }
        self.below.submit(request);
    }
}

#[test]
fn a_flush_over_one_protocol_keeps_what_was_written_over_the_other() {
    let kept = Arc::new(Kept { content: Mutex::new(vec![0; SIZE]), durable: Mutex::new(vec![0; SIZE]) });
    let rig = Rig::new(Arc::new(Forgetful { disk: MemoryDisk::new(SIZE as u64, 1), kept: kept.clone() }));
    let listener = UnixListener::bind(rig.path("vhost.sock")).unwrap();
    let threads = rig.plane.handles().to_vec();
    let export = VhostUserExport::start(listener, rig.export.volume().clone(), threads, ExportOptions::default()).unwrap();
    let guest = Frontend::connect(&rig.path("vhost.sock"));
    // One on each data-plane thread.
    let mut queues = [Queue::new(0, 64), Queue::new(1, 64)];
    queues.iter().for_each(|queue| guest.start(queue, 0));
    let mut client = rig.attach(Headers::Simple);
    for round in 1..=20u8 {
        let queue = &mut queues[usize::from(round) % 2];
        assert_eq!(queue.run(&guest.memory, T_OUT, 0, Data::Out(&[round; 512])), 0);
        assert_ne!(kept.durable.lock()[0], round, "the disk would have lost it");
        assert_eq!(client.ask(command::FLUSH, 0, 0, 0), Answer::Done);
        assert_eq!(kept.durable.lock()[..512], [round; 512]);

        assert_eq!(client.write_all(4096, &[round; 512]), Answer::Done);
        assert_ne!(kept.durable.lock()[4096], round, "the disk would have lost it");
        assert_eq!(queue.run(&guest.memory, T_FLUSH, 0, Data::None), 0);
        assert_eq!(kept.durable.lock()[4096..4608], [round; 512]);
    }
    drop((client, guest));
    export.stop();
}

#[cfg(feature = "fault-injection")]
#[test]
fn the_end_answers_what_is_in_flight_over_both_protocols() {
    const COUNT: u16 = 16;
    let faults = "faults = \"write delay_us=2000000\"\n\n[pool.local]";
    let mut daemon = common::Daemon::new("");
    let config = daemon.config();
    daemon.configure(&config.replace("[pool.local]", faults));
    daemon.start();
    daemon.json(&["volume", "create", "v", "--size", "1M", "--layout", "raw"]);
    daemon.json(&["export", "add", "v", "--nbd"]);
    let socket = daemon.path("v.sock");
    daemon.json(&["export", "add", "v", "--vhost-user", socket.to_str().unwrap()]);

    let mut client = Wire::connect(&daemon.path("nbd.sock")).attach("v", Headers::Structured);
    let guest = Frontend::connect(&socket);
    let mut queue = Queue::new(0, 64);
    guest.start(&queue, 0);
    let (of_client, of_guest) = (|index: u16| u64::from(index) * 4096, |index: u16| (512 << 10) + u64::from(index) * 4096);
    for index in 0..COUNT {
        client.write(0, of_client(index), &[1; 4096]);
        queue.write_request(&guest.memory, 3 * index, T_OUT, of_guest(index) / 512, Data::Out(&[2; 4096]));
        queue.offer(&guest.memory, 3 * index);
    }
    queue.kick();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(queue.used_index(&guest.memory), 0, "they are in flight");
    daemon.stop();
    for _ in 0..COUNT {
        assert_eq!(client.answer().1, Answer::Done);
        let (head, _) = queue.take_used(&guest.memory).expect("a request was not answered");
        assert_eq!(queue.status(&guest.memory, head), 0);
    }
    assert!(client.is_closed() && guest.is_hung_up());

    daemon.configure(&config);
    daemon.start();
    let mut client = daemon.attach("v");
    for index in 0..COUNT {
        assert_eq!(client.read(of_client(index), 4096), [1; 4096]);
        assert_eq!(client.read(of_guest(index), 4096), [2; 4096]);
    }
}
