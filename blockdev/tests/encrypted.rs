//! Encrypted devices: the conformance suite, an independent AES-XTS as oracle, holes, torn writes, and faults below.

use std::rc::Rc;
use std::sync::Arc;

use aes::Aes256;
use aes::cipher::KeyInit;
use blockdev::client::Client;
use blockdev::conformance::{DEVICE_SIZE, Suite, run};
use blockdev::layers::encrypted::{DATA_UNIT, Encrypted};
use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::layers::xts::Xts;
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use blockdev::{
    BlockDevice, BufferPool, Capabilities, DataPlane, DataPlaneOptions, DeviceError, Errno, ExtentKind, Geometry, IoQueue,
    Memory, Op, Reactor, Volume, VolumeOptions,
};
use xts_mode::Xts128;
use zeroize::Zeroizing;

const UNIT: u64 = DATA_UNIT as u64;

fn key(seed: u8) -> Zeroizing<[u8; 64]> {
    Zeroizing::new(std::array::from_fn(|index| index as u8 ^ seed))
}

fn oracle(seed: u8) -> Xts128<Aes256> {
    let key = key(seed);
    Xts128::new(Aes256::new(key[..32].into()), Aes256::new(key[32..].into()))
}

fn encrypted(below: Arc<dyn BlockDevice>, seed: u8) -> Arc<dyn BlockDevice> {
    Arc::new(Encrypted::new(below, key(seed)).unwrap())
}

fn text(seed: u64, len: usize) -> Vec<u8> {
    let word = |index: u64| seed.wrapping_add(index).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31);
    (0..).flat_map(|index| word(index).to_le_bytes()).take(len).collect()
}

/// A disk, and volumes that stand on it: one that encrypts, and one that shows what is stored.
struct Bench {
    plane: DataPlane,
    disk: Arc<MemoryDisk>,
}

impl Bench {
    fn new() -> Bench {
        let disk = Arc::new(MemoryDisk::new(DEVICE_SIZE, 512));
        Bench { plane: DataPlane::start(DataPlaneOptions::default()).unwrap(), disk }
    }

    fn open(&self, device: Arc<dyn BlockDevice>) -> Client {
        let options = VolumeOptions { name: "encrypted".into(), read_only: false, block_size: 512 };
        Client::open(&Volume::new(device, options), &self.plane.handles()[0]).unwrap()
    }

    fn plain(&self) -> Client {
        self.open(encrypted(self.disk.clone(), 1))
    }

    fn stored(&self) -> Client {
        self.open(self.disk.clone())
    }
}

#[test]
fn conforms_on_disks_of_any_block_size() {
    for block_size in [1, 512, 4096] {
        run(Suite { sequences: 24, resize: true }, || encrypted(Arc::new(MemoryDisk::new(DEVICE_SIZE, block_size)), 1));
    }
}

/// A disk with none of the optional abilities.
struct Plain(MemoryDisk);

impl BlockDevice for Plain {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        let all = self.0.capabilities();
        Capabilities { discard: false, write_zeroes: false, fast_zero: false, fua: false, block_status: false, ..all }
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        self.0.open_queue(reactor)
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.0.resize(size)
    }
}

#[test]
fn conforms_on_a_disk_without_abilities() {
    run(Suite::default(), || encrypted(Arc::new(Plain(MemoryDisk::new(DEVICE_SIZE, 512))), 1));
}

#[test]
fn what_is_stored_is_aes_xts_of_each_4096_bytes_under_their_number() {
    let bench = Bench::new();
    let (plain, stored) = (bench.plain(), bench.stored());
    for (offset, len) in [(0, 4096), (5 * UNIT, 128 << 10), (1 << 20, 3 << 20), (DEVICE_SIZE - UNIT, 4096)] {
        let content = text(offset, len);
        plain.write(offset, content.clone()).unwrap();
        let mut expected = content;
        oracle(1).encrypt_area(&mut expected, DATA_UNIT, u128::from(offset / UNIT), u128::to_le_bytes);
        assert!(stored.read(offset, len as u64).unwrap() == expected, "{len} bytes at {offset}");
    }
}

#[test]
fn the_cipher_agrees_with_the_oracle_on_units_of_any_length_and_number() {
    let mut cipher = Xts::new(&key(3)).unwrap();
    let pool = BufferPool::new(1 << 20, 0);
    for (len, unit) in [(16, 0), (512, 1), (4096, u64::from(u32::MAX) + 7), (4096, u64::MAX), (65536, 1 << 40)] {
        let mut expected = text(unit, len);
        let mut memory = Memory::from_buffer(pool.try_get(len).unwrap(), len);
        memory.copy_from(0, &expected);
        cipher.encrypt(&mut memory, 0, len, unit);
        oracle(3).encrypt_sector(&mut expected, u128::from(unit).to_le_bytes());
        let mut found = vec![0; len];
        memory.copy_to(0, &mut found);
        assert!(found == expected, "{len} bytes, unit {unit}");
        cipher.decrypt(&mut memory, 0, len, unit);
        memory.copy_to(0, &mut found);
        assert!(found == text(unit, len));
    }
    let same = Zeroizing::new([9; 64]);
    assert!(Xts::new(&same).is_none(), "both halves of the key are the same");
}

#[test]
fn holes_zeroes_and_what_was_discarded_read_as_zeroes_and_are_stored_as_they_were() {
    let bench = Bench::new();
    let (plain, stored) = (bench.plain(), bench.stored());
    let mib = 1 << 20;
    plain.write(0, text(1, 4 << 20)).unwrap();
    plain.run(Op::Discard, mib, mib, Vec::new()).unwrap();
    plain.run(Op::WriteZeroes { unmap: false, fua: false, fast: false }, 2 * mib, mib, Vec::new()).unwrap();
    assert!(plain.read(mib, 2 * mib).unwrap().iter().all(|byte| *byte == 0));
    assert!(stored.read(mib, 2 * mib).unwrap().iter().all(|byte| *byte == 0));
    let extents = plain.extents(0, DEVICE_SIZE).unwrap();
    assert_eq!(extents, stored.extents(0, DEVICE_SIZE).unwrap());
    assert!(extents.iter().any(|extent| extent.kind == ExtentKind::Hole));
    plain.write(mib, vec![0; 4096]).unwrap();
    assert!(stored.read(mib, UNIT).unwrap().iter().any(|byte| *byte != 0), "zeroes that were written are encrypted");
    assert!(plain.read(mib, UNIT).unwrap().iter().all(|byte| *byte == 0));
}

/// A power cut leaves some sectors of a write old and some new: each must read as one or the other.
#[test]
fn a_torn_write_damages_nothing_but_what_it_wrote() {
    let bench = Bench::new();
    let (plain, stored) = (bench.plain(), bench.stored());
    plain.write(0, text(1, 4096)).unwrap();
    let old = stored.read(0, UNIT).unwrap();
    plain.write(0, text(2, 4096)).unwrap();
    let new = stored.read(0, UNIT).unwrap();
    for landed in 1_u8..=254 {
        let is_new = |sector: usize| landed & 1 << sector != 0;
        let torn: Vec<u8> =
            (0..8).flat_map(|sector| if is_new(sector) { &new } else { &old }[sector * 512..][..512].to_vec()).collect();
        stored.write(0, torn).unwrap();
        let read = plain.read(0, UNIT).unwrap();
        for sector in 0..8 {
            let expected = text(if is_new(sector) { 2 } else { 1 }, 4096);
            assert!(read[sector * 512..][..512] == expected[sector * 512..][..512], "sector {sector} of {landed:08b}");
        }
    }
}

#[test]
fn another_key_reads_nothing_of_it() {
    let bench = Bench::new();
    bench.plain().write(0, text(1, 64 << 10)).unwrap();
    let other = bench.open(encrypted(bench.disk.clone(), 2)).read(0, 64 << 10).unwrap();
    let equal = other.iter().zip(text(1, 64 << 10)).filter(|(found, written)| **found == *written).count();
    assert!(equal < 1024, "{equal} of 65536 bytes are the same");
}

#[test]
fn sizes_that_are_no_multiple_of_a_data_unit_are_refused() {
    let odd = Arc::new(MemoryDisk::new(UNIT + 512, 512));
    assert!(Encrypted::new(odd, key(1)).err().unwrap().to_string().contains("multiple of 4096"));
    let device = encrypted(Arc::new(MemoryDisk::new(UNIT, 512)), 1);
    assert!(device.resize(UNIT + 512).is_err());
    device.resize(2 * UNIT).unwrap();
    assert_eq!(device.geometry().size, 2 * UNIT);
}

#[test]
fn errors_below_come_up_and_nothing_of_the_request_is_shown() {
    let bench = Bench::new();
    let plan = FaultPlan::new(1);
    let client = bench.open(encrypted(Arc::new(Faulty::new(bench.disk.clone(), plan.clone())), 1));
    client.write(0, text(1, 3 << 20)).unwrap();
    let fails = |class| FaultRule {
        class,
        errors_per_million: 1_000_000,
        errno: Errno::EIO,
        delay: std::time::Duration::ZERO,
        jitter: std::time::Duration::ZERO,
    };
    plan.set(vec![fails(OpClass::Read), fails(OpClass::Write)]);
    assert_eq!(client.read(0, 3 << 20), Err(Errno::EIO));
    assert_eq!(client.write(0, text(2, 3 << 20)), Err(Errno::EIO));
    plan.set(Vec::new());
    assert!(client.read(0, 3 << 20).unwrap() == text(1, 3 << 20));
}
