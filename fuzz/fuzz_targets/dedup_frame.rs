//! Stored frames: whatever bytes a backend gives, opening and unpacking them is an error or gives what was sealed.
//!
//! Input: one byte that chooses what is done, then bytes. They are unpacked by a codec; opened as a frame and as a header; or they damage a
//! frame that was sealed, which must then not open.

#![no_main]

use dedup::body::{Body, FrameReader};
use dedup::frame::{Codec, Compression, Compressor, Decompressor};
use dedup::hash::Domain;
use dedup::seal::Sealer;
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;

const ID: &[u8] = b"segment";
const KEY: [u8; 32] = [1; 32];
const BLOCK: [u8; 4096] = [7; 4096];

thread_local! {
    static DECOMPRESSOR: RefCell<Decompressor> = RefCell::default();
}

fn sealer(encrypting: bool) -> Sealer {
    let domain = Domain([2; 16]);
    if encrypting { Sealer::encrypting(domain, &KEY) } else { Sealer::checksumming(domain, &KEY) }
}

fn unpack(codec: u8, blocks: usize, packed: &[u8]) {
    let codec = Codec::from_id(codec % 3).unwrap();
    let mut out = vec![0; blocks * 4096];
    let unpacked = DECOMPRESSOR.with_borrow_mut(|decompressor| decompressor.unpack(codec, packed, &mut out));
    if unpacked.is_ok() && codec == Codec::Stored {
        assert_eq!(out, packed);
    }
}

/// Changes the bytes of a sealed frame to `damage`, from its first on.
fn damage(encrypting: bool, damage: &[u8]) {
    let sealer = sealer(encrypting);
    let mut body = Body::new(1 << 16);
    let record = body.push(&mut Compressor::default(), &[&BLOCK; 4], Compression::Lz4).unwrap();
    let sealed = sealer.seal(ID, &KEY, b"header", body).unwrap();
    let opener = sealer.opener(ID, &sealed.seal).unwrap();
    let mut stored = sealed.body[..record.len as usize].to_vec();
    let before = stored.clone();
    stored.iter_mut().zip(damage).for_each(|(byte, damage)| *byte ^= damage);
    let mut reader = FrameReader::default();
    let read = reader.read(&opener, record.unit, &stored);
    assert_eq!(read.is_ok(), stored == before);
    assert!(opener.open_header(damage).is_err());
}

fuzz_target!(|data: &[u8]| {
    let [choice, bytes @ ..] = data else { return };
    match choice >> 6 {
        0 | 1 => unpack(choice & 3, usize::from(choice >> 2 & 15) + 1, bytes),
        2 => damage(choice & 1 == 1, bytes),
        _ => {
            let sealer = sealer(choice & 1 == 1);
            let seal = sealer.seal(ID, &KEY, b"", Body::new(0)).unwrap().seal;
            let opener = sealer.opener(ID, &seal).unwrap();
            assert!(FrameReader::default().read(&opener, u32::from(*choice), bytes).is_err());
        }
    }
});
