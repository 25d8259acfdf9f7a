//! What earlier versions wrote must open for ever: the files under tests/golden are never written again, only added to.
//!
//! With NOVASTOR_WRITE_GOLDEN set, files that do not exist yet are made. Compressors may change what they write; what they wrote must still
//! be read, so nothing here compares what is written today with the files.

use dedup::body::{Body, FrameReader, FrameRecord};
use dedup::frame::{Codec, Compression, Compressor, Decompressor};
use dedup::hash::{BlockHash, Domain, DomainKind, Hasher};
use dedup::location::UNIT_LEN;
use dedup::seal::{Protection, Seal, Sealer};
use dedup::{BLOCK_LEN, Block};
use std::path::PathBuf;

const POOL_KEY: [u8; 32] = *b"a pool's key for tests, 32 bytes";
const DATA_KEY: [u8; 32] = *b"a data key for tests,   32 bytes";
const RANDOM: [u8; 32] = *b"bytes that are random elsewhere!";
const UUID: [u8; 16] = *b"uuid of a volume";
const SEGMENT_ID: &[u8] = b"volume/w/0000000000000001/0000000000000002";
const HEADER: &[u8] = b"the header of a segment, which another crate lays out";
const FRAMES: [(Compression, &[u8]); 4] = [
    (Compression::Zstd { level: 1 }, &[1, 2, 3, 4]),
    (Compression::Lz4, &[5, 6, 7, 8]),
    (Compression::Off, &[9]),
    (Compression::Zstd { level: 3 }, &[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]),
];

/// Numbered lines of text, different in each block.
fn block(number: u8) -> Block {
    let lines: String =
        (0..200).map(|line| format!("block {number}, line {line}: {}\n", u32::from(number) * 7919 * line % 1009)).collect();
    let mut block = [0; BLOCK_LEN];
    block.copy_from_slice(&lines.as_bytes()[..BLOCK_LEN]);
    block
}

fn content(numbers: &[u8]) -> Vec<u8> {
    numbers.iter().flat_map(|number| block(*number)).collect()
}

fn golden(name: &str, make: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("NOVASTOR_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, make()).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn frames_of_every_codec_open() {
    for (name, codec, compression) in [
        ("frame-stored.bin", Codec::Stored, Compression::Off),
        ("frame-lz4.bin", Codec::Lz4, Compression::Lz4),
        ("frame-zstd.bin", Codec::Zstd, Compression::Zstd { level: 1 }),
    ] {
        let numbers = [1, 2, 3, 4];
        let packed = golden(name, || {
            let (blocks, mut out) = (numbers.map(block), Vec::new());
            assert_eq!(Compressor::default().pack(&blocks.each_ref(), compression, &mut out), codec);
            out
        });
        let mut joined = vec![0; numbers.len() * BLOCK_LEN];
        Decompressor::default().unpack(codec, &packed, &mut joined).unwrap();
        assert_eq!(joined, content(&numbers), "{name}");
    }
}

/// One file: seal, u32 length of the sealed header, sealed header, body.
fn make_segment(sealer: &Sealer) -> Vec<u8> {
    let (mut body, mut compressor) = (Body::new(1 << 20), Compressor::default());
    for (compression, numbers) in FRAMES {
        let blocks: Vec<_> = numbers.iter().map(|number| block(*number)).collect();
        body.push(&mut compressor, &blocks.iter().collect::<Vec<_>>(), compression).unwrap();
    }
    let sealed = sealer.seal(SEGMENT_ID, &RANDOM, HEADER, body).unwrap();
    let header_len = (sealed.header.len() as u32).to_le_bytes();
    [&sealed.seal.to_bytes()[..], &header_len, &sealed.header, &sealed.body].concat()
}

#[test]
fn sealed_segments_open() {
    let domain = Domain::new(DomainKind::Volume, &UUID);
    for (name, sealer) in [
        ("segment-aes-256-gcm.bin", Sealer::encrypting(domain, &DATA_KEY)),
        ("segment-checksum.bin", Sealer::checksumming(domain, &POOL_KEY)),
    ] {
        let file = golden(name, || make_segment(&sealer));
        let (seal, rest) = file.split_first_chunk().unwrap();
        let (header_len, rest) = rest.split_first_chunk().unwrap();
        let (header, body) = rest.split_at(u32::from_le_bytes(*header_len) as usize);
        let opener = sealer.opener(SEGMENT_ID, &Seal::from_bytes(seal)).unwrap();
        assert_eq!(opener.open_header(header).unwrap(), HEADER, "{name}");
        let (mut reader, mut unit) = (FrameReader::default(), 0);
        for (_, numbers) in FRAMES {
            let stored = &body[unit as usize * UNIT_LEN..];
            assert_eq!(reader.read(&opener, unit, stored).unwrap(), content(numbers), "{name}, unit {unit}");
            let mut packed = Vec::new();
            let prefix = opener.open_frame(unit, stored, &mut packed).unwrap();
            assert_eq!(usize::from(prefix.blocks), numbers.len());
            let len = 4 + packed.len() as u32 + 16;
            let record = FrameRecord { unit, len, codec: prefix.codec, blocks: prefix.blocks };
            assert!(record.spot(0).is_some_and(|spot| spot.class().bytes() >= len as usize));
            unit += len.div_ceil(UNIT_LEN as u32);
        }
        assert_eq!(unit as usize * UNIT_LEN, body.len(), "{name}");
    }
}

#[test]
fn hashes_and_ids_are_what_they_were() {
    let domain = Domain::new(DomainKind::Volume, &UUID);
    let hash = Hasher::new(&POOL_KEY, domain).hash(&block(1));
    let known = golden("hash.bin", || [domain.0, hash.0].concat());
    assert_eq!((&domain.0[..], hash), (&known[..16], BlockHash(known[16..].try_into().unwrap())));
    assert_eq!([Protection::Checksum, Protection::Aes256Gcm].map(|protection| protection as u8), [0, 1]);
    assert_eq!((Protection::from_id(1), Protection::from_id(2)), (Some(Protection::Aes256Gcm), None));
}
