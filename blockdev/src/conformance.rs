//! What every device, and every stack of layers, must do. Tests of drivers call [`run`] with a way to make fresh devices.
//!
//! The suite drives the device through a [`Volume`] on real data-plane threads, as front ends do: fixed cases first, then random
//! sequences against a model in memory, with many requests in flight and from two threads at once.

use std::sync::{Arc, mpsc};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::client::{Answer, Client};
use crate::device::BlockDevice;
use crate::errno::Errno;
use crate::reactor::{DataPlane, DataPlaneOptions};
use crate::request::{ExtentKind, Op};
use crate::volume::{Volume, VolumeOptions};

const MIB: u64 = 1 << 20;
/// Fresh devices must have this size, in bytes.
pub const DEVICE_SIZE: u64 = 16 * MIB;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// Random sequences to try.
    pub sequences: u32,
    /// Whether the device can be resized.
    pub resize: bool,
}

impl Default for Suite {
    fn default() -> Self {
        Suite { sequences: 24, resize: true }
    }
}

/// Runs the suite; panics on the first thing that is wrong. `fresh` makes a device of [`DEVICE_SIZE`] bytes that reads as zeroes.
pub fn run(suite: Suite, fresh: impl Fn() -> Arc<dyn BlockDevice>) {
    let plane = DataPlane::start(DataPlaneOptions::default()).expect("io_uring is needed for this test");
    let bench = Bench { plane: &plane };
    bench.fresh_reads_zero(fresh());
    bench.round_trips_of_many_sizes(fresh());
    bench.bounds(fresh());
    bench.discard_and_zeroes(fresh());
    bench.status_covers_and_agrees(fresh());
    bench.read_only(fresh());
    bench.overlapping_writes_land_in_order(fresh());
    bench.held_writes_wait(fresh());
    bench.two_threads_see_each_other(fresh());
    if suite.resize {
        bench.resize(fresh());
    }
    bench.random_sequences(suite, &fresh);
}

struct Bench<'a> {
    plane: &'a DataPlane,
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

impl Bench<'_> {
    fn volume(&self, device: Arc<dyn BlockDevice>, read_only: bool) -> Arc<Volume> {
        assert_eq!(device.geometry().size, DEVICE_SIZE, "the suite needs devices of 16 MiB");
        Volume::new(device, VolumeOptions { name: "conformance".into(), read_only, block_size: 512 })
    }

    fn client(&self, volume: &Arc<Volume>, thread: usize) -> Client {
        let handles = self.plane.handles();
        Client::open(volume, &handles[thread % handles.len()]).expect("the device opens a queue")
    }

    fn open(&self, device: Arc<dyn BlockDevice>) -> Client {
        self.client(&self.volume(device, false), 0)
    }

    fn fresh_reads_zero(&self, device: Arc<dyn BlockDevice>) {
        let client = self.open(device);
        assert!(client.read(0, MIB).unwrap().iter().all(|byte| *byte == 0));
        assert!(client.read(DEVICE_SIZE - 4096, 4096).unwrap().iter().all(|byte| *byte == 0));
        client.flush().unwrap();
    }

    fn round_trips_of_many_sizes(&self, device: Arc<dyn BlockDevice>) {
        let client = self.open(device);
        for (offset, len) in
            [(0, 512), (512, 512), (4096, 4096), (1, 1), (511, 2), (4095, 4098), (MIB - 1, 3 * MIB), (DEVICE_SIZE - 513, 513)]
        {
            let data = pattern(offset + len, len as usize);
            client.write(offset, data.clone()).unwrap();
            assert!(client.read(offset, len).unwrap() == data, "{len} bytes at {offset}");
        }
        client.run(Op::Write { fua: true }, 8192, 4096, pattern(1, 4096)).unwrap();
        assert!(client.read(8192, 4096).unwrap() == pattern(1, 4096));
        client.flush().unwrap();
    }

    fn bounds(&self, device: Arc<dyn BlockDevice>) {
        let client = self.open(device);
        assert_eq!(client.write(DEVICE_SIZE - 512, vec![1; 1024]), Err(Errno::ENOSPC));
        assert_eq!(client.read(DEVICE_SIZE, 512), Err(Errno::EINVAL));
        assert_eq!(client.read(u64::MAX - 100, 512), Err(Errno::EINVAL));
        for op in [Op::Discard, Op::WriteZeroes { unmap: true, fua: false, fast: false }, Op::BlockStatus] {
            assert!(client.run(op, DEVICE_SIZE - 512, 1024, Vec::new()).is_err(), "{op:?} past the end");
            assert!(client.run(op, u64::MAX, u64::MAX, Vec::new()).is_err(), "{op:?} overflows");
        }
        assert!(client.read(DEVICE_SIZE - 512, 512).unwrap().iter().all(|byte| *byte == 0), "a refused write wrote");
    }

    fn discard_and_zeroes(&self, device: Arc<dyn BlockDevice>) {
        let client = self.open(device);
        for unmap in [false, true] {
            client.write(0, pattern(2, MIB as usize)).unwrap();
            client.run(Op::WriteZeroes { unmap, fua: unmap, fast: false }, 4096, 8192, Vec::new()).unwrap();
            client.run(Op::WriteZeroes { unmap, fua: false, fast: false }, 65536 + 100, 10000, Vec::new()).unwrap();
            client.run(Op::WriteZeroes { unmap, fua: false, fast: false }, 300_000, 7, Vec::new()).unwrap();
            let mut expected = pattern(2, MIB as usize);
            expected[4096..4096 + 8192].fill(0);
            expected[65636..75636].fill(0);
            expected[300_000..300_007].fill(0);
            assert!(client.read(0, MIB).unwrap() == expected, "zeroes, unmap {unmap}");
        }
        client.write(2 * MIB, pattern(3, 4 * MIB as usize)).unwrap();
        client.run(Op::Discard, 3 * MIB, 2 * MIB, Vec::new()).unwrap();
        assert!(client.read(2 * MIB, MIB).unwrap() == pattern(3, 4 * MIB as usize)[..MIB as usize]);
        if client.volume().capabilities().discard {
            assert!(client.read(3 * MIB, 2 * MIB).unwrap().iter().all(|byte| *byte == 0), "discarded blocks read as zeroes");
        }
    }

    fn status_covers_and_agrees(&self, device: Arc<dyn BlockDevice>) {
        let client = self.open(device);
        client.write(5 * MIB, pattern(4, 100_000)).unwrap();
        let mut at = 0;
        let mut data_seen = 0;
        while at < DEVICE_SIZE {
            let extents = client.extents(at, DEVICE_SIZE - at).unwrap();
            assert!(!extents.is_empty() && extents.iter().all(|extent| extent.len > 0));
            for extent in extents {
                if extent.kind == ExtentKind::Data {
                    data_seen += extent.len;
                } else {
                    let bytes = client.read(at, extent.len.min(MIB)).unwrap();
                    assert!(bytes.iter().all(|byte| *byte == 0), "{:?} at {at} holds data", extent.kind);
                }
                at += extent.len;
            }
        }
        assert_eq!(at, DEVICE_SIZE);
        assert!(data_seen >= 100_000);
        assert_eq!(client.extents(5 * MIB + 10, 7).unwrap().iter().map(|extent| extent.len).sum::<u64>(), 7);
    }

    fn read_only(&self, device: Arc<dyn BlockDevice>) {
        let client = self.client(&self.volume(device, true), 0);
        assert_eq!(client.write(0, vec![1; 512]), Err(Errno::EPERM));
        assert_eq!(client.run(Op::Discard, 0, 512, Vec::new()).unwrap_err(), Errno::EPERM);
        client.read(0, 512).unwrap();
        client.flush().unwrap();
    }

    fn overlapping_writes_land_in_order(&self, device: Arc<dyn BlockDevice>) {
        let client = self.open(device);
        let (sender, receiver) = mpsc::channel();
        const WRITES: u64 = 200;
        for number in 0..WRITES {
            let sender = sender.clone();
            let offset = 4096 + number % 7 * 100;
            client.submit(Op::Write { fua: false }, offset, 3000, vec![number as u8; 3000], move |answer| {
                sender.send(answer.map(drop)).unwrap();
            });
        }
        for _ in 0..WRITES {
            receiver.recv().unwrap().unwrap();
        }
        let mut expected = vec![0; 4000];
        for number in 0..WRITES {
            let start = (number % 7 * 100) as usize;
            expected[start..start + 3000].fill(number as u8);
        }
        assert!(client.read(4096, 4000).unwrap() == expected);
    }

    fn held_writes_wait(&self, device: Arc<dyn BlockDevice>) {
        let client = self.open(device);
        let hold = client.volume().hold_writes();
        let (sender, receiver) = mpsc::channel();
        client.submit(Op::Write { fua: false }, 0, 512, vec![1; 512], move |answer| sender.send(answer.map(drop)).unwrap());
        assert_eq!(client.read(0, 512).unwrap(), vec![0; 512], "reads go on");
        assert!(receiver.try_recv().is_err(), "a held write completed");
        drop(hold);
        receiver.recv().unwrap().unwrap();
        assert_eq!(client.read(0, 512).unwrap(), vec![1; 512]);
    }

    fn two_threads_see_each_other(&self, device: Arc<dyn BlockDevice>) {
        let volume = self.volume(device, false);
        let clients = [self.client(&volume, 0), self.client(&volume, 1)];
        std::thread::scope(|scope| {
            for (number, client) in clients.iter().enumerate() {
                scope.spawn(move || {
                    for round in 0..100 {
                        let offset = (round * 2 + number as u64) * 1000;
                        client.write(offset, pattern(offset, 1000)).unwrap();
                        client.flush().unwrap();
                    }
                });
            }
        });
        for (index, client) in clients.iter().enumerate() {
            for block in 0..200 {
                let offset = block * 1000;
                assert!(client.read(offset, 1000).unwrap() == pattern(offset, 1000), "block {block} through queue {index}");
            }
        }
    }

    fn resize(&self, device: Arc<dyn BlockDevice>) {
        let volume = self.volume(device, false);
        let (sender, receiver) = mpsc::channel();
        let watch = volume.watch_size(move |size| sender.send(size).unwrap());
        let client = self.client(&volume, 0);
        client.write(DEVICE_SIZE - 4096, pattern(5, 4096)).unwrap();
        volume.resize(2 * DEVICE_SIZE).unwrap();
        assert_eq!(receiver.recv().unwrap(), 2 * DEVICE_SIZE);
        volume.unwatch(watch);
        assert!(client.read(DEVICE_SIZE - 4096, 4096).unwrap() == pattern(5, 4096));
        assert!(client.read(DEVICE_SIZE, MIB).unwrap().iter().all(|byte| *byte == 0));
        client.write(2 * DEVICE_SIZE - 4096, pattern(6, 4096)).unwrap();
        volume.resize(DEVICE_SIZE).unwrap();
        assert!(client.read(DEVICE_SIZE, 512).is_err());
        volume.resize(2 * DEVICE_SIZE).unwrap();
        assert!(client.read(2 * DEVICE_SIZE - 4096, 4096).unwrap().iter().all(|byte| *byte == 0), "shrinking kept data");
        assert!(volume.stats().class(crate::stats::OpClass::Write).ended >= 2);
    }

    fn random_sequences(&self, suite: Suite, fresh: &impl Fn() -> Arc<dyn BlockDevice>) {
        let mut runner = TestRunner::new(Config { cases: suite.sequences, failure_persistence: None, ..Config::default() });
        let outcome = runner
            .run(&proptest::collection::vec(step(), 1..60), |steps| self.sequence(fresh(), &steps).map_err(TestCaseError::fail));
        if let Err(failure) = outcome {
            panic!("{failure}");
        }
    }

    /// Submits runs of changes without waiting in between, and checks all content after each run.
    fn sequence(&self, device: Arc<dyn BlockDevice>, steps: &[Step]) -> Result<(), String> {
        let volume = self.volume(device, false);
        let clients = [self.client(&volume, 0), self.client(&volume, 1)];
        let mut model = vec![0; WINDOW as usize];
        for (round, run) in steps.chunks(8).enumerate() {
            let client = &clients[round % 2];
            let (sender, receiver) = mpsc::channel();
            for (number, step) in run.iter().enumerate() {
                let (op, offset, data) = step.apply(&mut model, (round * 8 + number) as u64);
                let sender = sender.clone();
                let len = if data.is_empty() { step.len } else { data.len() as u64 };
                client.submit(op, offset, len, data, move |answer| {
                    let _ = sender.send((op, answer.map(|answer| matches!(answer, Answer::Done))));
                });
            }
            drop(sender);
            for (op, answer) in receiver {
                answer.map_err(|errno| format!("{op:?}: {errno}"))?;
            }
            let content = clients[(round + 1) % 2].read(0, WINDOW).map_err(|errno| errno.to_string())?;
            if let Some(at) = content.iter().zip(&model).position(|(got, want)| got != want) {
                return Err(format!("byte {at} is {:#x}, should be {:#x}", content[at], model[at]));
            }
        }
        Ok(())
    }
}

/// The part of the device that random sequences work on, in bytes.
const WINDOW: u64 = 256 << 10;

#[derive(Clone, Debug)]
enum Change {
    Write { fua: bool },
    Zeroes { unmap: bool, fua: bool },
    Flush,
}

#[derive(Clone, Debug)]
struct Step {
    change: Change,
    offset: u64,
    len: u64,
}

impl Step {
    fn apply(&self, model: &mut [u8], seed: u64) -> (Op, u64, Vec<u8>) {
        let range = self.offset as usize..(self.offset + self.len) as usize;
        match self.change {
            Change::Write { fua } => {
                let data = pattern(seed, self.len as usize);
                model[range].copy_from_slice(&data);
                (Op::Write { fua }, self.offset, data)
            }
            Change::Zeroes { unmap, fua } => {
                model[range].fill(0);
                (Op::WriteZeroes { unmap, fua, fast: false }, self.offset, Vec::new())
            }
            Change::Flush => (Op::Flush, 0, Vec::new()),
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let change = prop_oneof![
        4 => any::<bool>().prop_map(|fua| Change::Write { fua }),
        2 => any::<(bool, bool)>().prop_map(|(unmap, fua)| Change::Zeroes { unmap, fua }),
        1 => Just(Change::Flush),
    ];
    let unit = prop_oneof![3 => Just(4096u64), 2 => Just(512), 1 => Just(1)];
    (change, unit, 0..WINDOW, 1..32768u64).prop_map(|(change, unit, offset, len)| {
        let offset = offset / unit * unit;
        let len = len.next_multiple_of(unit).min(WINDOW - offset);
        Step { change, offset, len }
    })
}
