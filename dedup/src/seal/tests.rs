use super::*;
use crate::body::FrameReader;
use crate::frame::{Compression, Compressor};
use crate::location::UNIT_LEN;
use crate::{Block, samples};
use proptest::prelude::*;

const ID: &[u8] = b"w/1/7";
const RANDOM: [u8; 32] = [9; 32];
const HEADER: &[u8] = b"which block is where";
const KEY: [u8; 32] = [5; 32];
const DOMAIN: Domain = Domain([3; 16]);

fn body(frames: &[Vec<Block>]) -> Body {
    let mut body = Body::new(1 << 20);
    let mut compressor = Compressor::default();
    for (index, blocks) in frames.iter().enumerate() {
        let compression = [Compression::Off, Compression::Lz4, Compression::Zstd { level: 1 }][index % 3];
        body.push(&mut compressor, &blocks.iter().collect::<Vec<_>>(), compression).unwrap();
    }
    body
}

fn frames() -> Vec<Vec<Block>> {
    (0..6).map(|frame| (0..=frame % 4).map(|block| samples::text(frame * 4 + block)).collect()).collect()
}

fn sealers() -> [Sealer; 2] {
    [Sealer::encrypting(DOMAIN, &KEY), Sealer::checksumming(DOMAIN, &KEY)]
}

fn seal(sealer: &Sealer) -> (Vec<crate::body::FrameRecord>, Sealed) {
    let body = body(&frames());
    let records = body.frames().to_vec();
    (records, sealer.seal(ID, &RANDOM, HEADER, body).unwrap())
}

#[test]
fn a_segment_opens_as_it_was_sealed() {
    for sealer in sealers() {
        let (records, sealed) = seal(&sealer);
        assert_eq!(Seal::from_bytes(&sealed.seal.to_bytes()), sealed.seal);
        let opener = sealer.opener(ID, &sealed.seal).unwrap();
        assert_eq!(opener.open_header(&sealed.header).unwrap(), HEADER);
        let mut reader = FrameReader::default();
        for (record, blocks) in records.iter().zip(frames()) {
            let stored = &sealed.body[record.unit as usize * UNIT_LEN..];
            assert_eq!(reader.read(&opener, record.unit, stored).unwrap(), blocks.concat());
            let exact = &stored[..record.len as usize];
            for (block, content) in (0..).zip(&blocks) {
                let mut out = [0; 4096];
                reader.read_block(&opener, record.spot(block).unwrap(), exact, &mut out).unwrap();
                assert_eq!(out, *content);
            }
        }
    }
}

#[test]
fn encryption_leaves_nothing_in_clear() {
    let [encrypting, checksumming] = sealers();
    let clear = |sealer: &Sealer| {
        let sealed = seal(sealer).1;
        let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        (holds(&sealed.body, b"segment "), holds(&sealed.header, HEADER))
    };
    assert_eq!(clear(&checksumming), (true, true));
    assert_eq!(clear(&encrypting), (false, false));
}

#[test]
fn a_retry_gives_the_same_bytes() {
    for sealer in sealers() {
        let [one, two] = [seal(&sealer.clone()).1, seal(&sealer).1];
        assert_eq!((one.seal, &one.header, &one.body), (two.seal, &two.header, &two.body));
    }
}

/// Whatever differs in the input, one nonce is never used under the same key: the salts differ.
#[test]
fn any_difference_changes_the_salt() {
    let salt = |domain: Domain, key: &[u8; 32], id: &[u8], random: &[u8; 32], header: &[u8], frames: &[Vec<Block>]| {
        let sealed = Sealer::encrypting(domain, key).seal(id, random, header, body(frames)).unwrap();
        sealed.seal.salt
    };
    let frames = frames();
    let mut other_frames = frames.clone();
    other_frames[3][1][4095] ^= 1;
    let mut split_frames = frames.clone();
    let moved = split_frames[3].split_off(2);
    split_frames.insert(4, moved);
    let salts = [
        salt(DOMAIN, &KEY, ID, &RANDOM, HEADER, &frames),
        salt(Domain([4; 16]), &KEY, ID, &RANDOM, HEADER, &frames),
        salt(DOMAIN, &[6; 32], ID, &RANDOM, HEADER, &frames),
        salt(DOMAIN, &KEY, b"w/1/8", &RANDOM, HEADER, &frames),
        salt(DOMAIN, &KEY, ID, &[8; 32], HEADER, &frames),
        salt(DOMAIN, &KEY, ID, &RANDOM, b"Which block is where", &frames),
        salt(DOMAIN, &KEY, ID, &RANDOM, b"", &frames),
        salt(DOMAIN, &KEY, ID, &RANDOM, HEADER, &other_frames),
        salt(DOMAIN, &KEY, ID, &RANDOM, HEADER, &split_frames),
        salt(DOMAIN, &KEY, ID, &RANDOM, HEADER, &frames[..5]),
        salt(DOMAIN, &KEY, ID, &RANDOM, HEADER, &[]),
        // What moves from one part to the next is not the same either.
        salt(DOMAIN, &KEY, b"w/1/7which", &RANDOM, b" block is where", &frames),
    ];
    for (index, salt) in salts.iter().enumerate() {
        assert!(!salts[..index].contains(salt), "{index}");
    }
}

/// Every bit that is stored and means something is checked.
#[test]
fn any_flipped_bit_is_found() {
    for sealer in sealers() {
        let (records, sealed) = seal(&sealer);
        let opener = sealer.opener(ID, &sealed.seal).unwrap();
        let mut packed = Vec::new();
        for record in &records {
            let start = record.unit as usize * UNIT_LEN;
            let mut stored = sealed.body[start..start + record.len as usize].to_vec();
            for at in 0..stored.len() {
                stored[at] ^= 1 << (at % 8);
                assert!(opener.open_frame(record.unit, &stored, &mut packed).is_err(), "byte {at}");
                assert!(packed.is_empty());
                stored[at] ^= 1 << (at % 8);
            }
            opener.open_frame(record.unit, &stored, &mut packed).unwrap();
        }
        for at in 0..sealed.header.len() {
            let mut header = sealed.header.clone();
            header[at] ^= 1;
            assert_eq!(opener.open_header(&header), Err(SealError::HeaderChanged));
        }
        for at in 0..Seal::LEN {
            let mut seal = sealed.seal.to_bytes();
            seal[at] ^= 1;
            assert_eq!(sealer.opener(ID, &Seal::from_bytes(&seal)).err(), Some(SealError::WrongKey), "byte {at}");
        }
    }
}

#[test]
fn a_frame_opens_only_in_its_place() {
    for sealer in sealers() {
        let (records, sealed) = seal(&sealer);
        let opener = sealer.opener(ID, &sealed.seal).unwrap();
        let mut packed = Vec::new();
        for record in &records {
            for other in &records {
                let stored = &sealed.body[record.unit as usize * UNIT_LEN..];
                let opened = opener.open_frame(other.unit, stored, &mut packed).map(|_| ());
                let expected = if record == other { Ok(()) } else { Err(SealError::FrameChanged(other.unit)) };
                assert_eq!(opened, expected);
            }
            assert!(opener.open_frame(HEADER_NUMBER, &sealed.body[record.unit as usize * UNIT_LEN..], &mut packed).is_err());
        }
    }
}

#[test]
fn another_key_domain_or_segment_is_told_apart_from_rot() {
    let sealed = seal(&sealers()[0]).1.seal;
    assert!(sealers()[0].opener(ID, &sealed).is_ok());
    for (sealer, id) in [
        (Sealer::encrypting(DOMAIN, &[6; 32]), ID),
        (Sealer::encrypting(Domain([4; 16]), &KEY), ID),
        (Sealer::checksumming(DOMAIN, &KEY), ID),
        (sealers()[0].clone(), b"w/1/8"),
    ] {
        assert_eq!(sealer.opener(id, &sealed).err(), Some(SealError::WrongKey));
    }
    // Checksums have one key for all segments of a domain; there the frames themselves refuse another segment.
    let (records, sealed) = seal(&sealers()[1]);
    assert_eq!(Sealer::checksumming(DOMAIN, &[6; 32]).opener(ID, &sealed.seal).err(), Some(SealError::WrongKey));
    assert_eq!(Sealer::checksumming(Domain([4; 16]), &KEY).opener(ID, &sealed.seal).err(), Some(SealError::WrongKey));
    let opener = sealers()[1].opener(b"w/1/8", &sealed.seal).unwrap();
    assert!(records.iter().all(|record| {
        opener.open_frame(record.unit, &sealed.body[record.unit as usize * UNIT_LEN..], &mut Vec::new()).is_err()
    }));
    assert_eq!(opener.open_header(&sealed.header), Err(SealError::HeaderChanged));
}

/// Built from the primitives as the module's head says, byte by byte.
#[test]
fn a_seal_is_what_is_documented() {
    let block = samples::text(0);
    let frames = [vec![block], vec![samples::noise(1)]];
    let unsealed = body(&frames).bytes;
    let sealed = sealers()[0].seal(ID, &RANDOM, HEADER, body(&frames)).unwrap();

    let salt_key = blake3::derive_key("novastor v1 salt key", &[&KEY[..], &DOMAIN.0].concat());
    let lens = [(ID.len() as u32).to_le_bytes().to_vec(), (HEADER.len() as u64).to_le_bytes().to_vec()];
    let input = [&RANDOM[..], &DOMAIN.0, &lens[0], ID, &lens[1], HEADER, &unsealed].concat();
    assert_eq!(sealed.seal.salt, *blake3::keyed_hash(&salt_key, &input).as_bytes());

    // HKDF (RFC 5869) written out with HMAC.
    use aws_lc_rs::hmac::{HMAC_SHA256, Key, sign};
    let extracted = sign(&Key::new(HMAC_SHA256, &sealed.seal.salt), &KEY);
    let expand = Key::new(HMAC_SHA256, extracted.as_ref());
    let info = [&b"novastor v1 seal"[..], &DOMAIN.0, ID].concat();
    let key = sign(&expand, &[&info[..], &[1]].concat());
    let commitment = sign(&expand, &[key.as_ref(), &info, &[2]].concat());
    assert_eq!(sealed.seal.commitment, commitment.as_ref());

    // The first frame is stored as it is, from byte 4 to 4100, and its tag follows.
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_ref()).unwrap());
    let aad = [&DOMAIN.0[..], &[0, 0, 0, 0], &[0, 1, 0xff, 0x0f], ID].concat();
    let mut opened = sealed.body[4..4100 + 16].to_vec();
    assert_eq!(sealed.body[..4], [0, 1, 0xff, 0x0f]);
    key.open_in_place(Nonce::assume_unique_for_key([0; 12]), Aad::from(aad), &mut opened).unwrap();
    assert_eq!(opened[..4096], block);
    assert!(sealed.body[4116..4160].iter().all(|byte| *byte == 0));
    // The second one begins at unit 65.
    let aad = [&DOMAIN.0[..], &[65, 0, 0, 0], &sealed.body[4160..4164], ID].concat();
    let mut opened = sealed.body[4164..4164 + 4096 + 16].to_vec();
    let nonce = [65, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), &mut opened).unwrap();
    assert_eq!(opened[..4096], frames[1][0]);

    let sealed = sealers()[1].seal(ID, &RANDOM, HEADER, body(&frames)).unwrap();
    let checksum_key = blake3::derive_key("novastor v1 checksum", &[&KEY[..], &DOMAIN.0].concat());
    let input = [&DOMAIN.0[..], &[0, 0, 0, 0], &[0, 1, 0xff, 0x0f], ID, &block].concat();
    assert_eq!(sealed.body[4..4100], block);
    assert_eq!(sealed.body[4100..4116], blake3::keyed_hash(&checksum_key, &input).as_bytes()[..16]);
    assert_eq!(sealed.seal.commitment, blake3::derive_key("novastor v1 checksum key check", &checksum_key));
}

#[test]
fn an_empty_segment_is_sealed_too() {
    for sealer in sealers() {
        let sealed = sealer.seal(ID, &RANDOM, b"", Body::new(0)).unwrap();
        assert_eq!((sealed.header.len(), sealed.body.len()), (16, 0));
        assert_eq!(sealer.opener(ID, &sealed.seal).unwrap().open_header(&sealed.header).unwrap(), b"");
        assert!(sealer.opener(ID, &sealed.seal).unwrap().open_header(&sealed.header[1..]).is_err());
    }
}

proptest! {
    #[test]
    fn hostile_bytes_are_an_error(unit in any::<u32>(), stored in prop::collection::vec(any::<u8>(), 0..6000), like_one in any::<bool>()) {
        let mut stored = stored;
        if like_one && stored.len() >= 4 {
            stored[..4].copy_from_slice(&[2, 4, 0, 1]);
        }
        for sealer in sealers() {
            let opener = sealer.opener(ID, &seal(&sealer).1.seal).unwrap();
            prop_assert!(FrameReader::default().read(&opener, unit, &stored).is_err());
            prop_assert!(opener.open_header(&stored).is_err());
        }
    }
}
