//! What all objects of a volume have in common: a header in clear, a sealed part, and a body of frames. All numbers are little-endian.
//!
//! ```text
//!   0  magic "NVSEGMNT"                    48  next epoch             u64   (of a seal of an epoch)
//!   8  CRC32C of 12..end of sealed part    56  length of the sealed part u32 · protection u8 · family u8 · zero 2
//!  12  kind: 1 step, 2 seal, 3 meta  u32   64  seal                   64 bytes
//!  16  group                    16 bytes  128  the sealed part, zeroes up to 64 bytes
//!  32  epoch                    u64             the body: sealed frames
//!  40  number                   u64
//! ```

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use dedup::body::Body;
use dedup::seal::{Opener, Seal, SealError, Sealer};

use crate::bytes_at::{array_at, crc32c, u32_at, u64_at};
use crate::error::VolumeError;
use crate::names::Source;

/// Bytes of the header in clear.
pub(crate) const CLEAR_LEN: usize = 128;
const MAGIC: [u8; 8] = *b"NVSEGMNT";
const ALIGNMENT: usize = 64;
/// The most bytes of both headers.
const HEADER_MAX: usize = 16 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Step = 1,
    /// Ends an epoch of a history.
    Seal = 2,
    Meta = 3,
}

/// An object ready to be stored.
pub(crate) struct Sealed {
    pub(crate) header: Bytes,
    pub(crate) body: Bytes,
    pub(crate) opened: Opened,
}

/// How the frames of an object are read.
pub(crate) struct Opened {
    /// Where the body begins.
    pub(crate) body_at: u64,
    pub(crate) opener: Opener,
    /// Something sealed was read by it, so that what the header in clear says is right.
    is_proven: AtomicBool,
}

impl Opened {
    fn new(body_at: usize, opener: Opener, is_proven: bool) -> Opened {
        Opened { body_at: body_at as u64, opener, is_proven: is_proven.into() }
    }

    pub(crate) fn is_proven(&self) -> bool {
        self.is_proven.load(Ordering::Relaxed)
    }

    pub(crate) fn prove(&self) {
        self.is_proven.store(true, Ordering::Relaxed);
    }
}

/// What the header in clear says.
pub(crate) struct Clear {
    kind: u32,
    next: u64,
    sealed_len: usize,
    protection: u8,
    seal: Seal,
}

/// Seals an object. `random` is fresh for each; `inner` is what the sealed part will say.
pub(crate) fn seal(
    sealer: &Sealer,
    source: &Source,
    kind: Kind,
    random: &[u8; 32],
    inner: &[u8],
    body: Body,
) -> Result<Sealed, SealError> {
    let sealed = sealer.seal(&source.to_bytes(), random, inner, body)?;
    let header = encode(source, kind, 0, sealer.protection() as u8, sealed.seal.to_bytes(), &sealed.header);
    let opened = Opened::new(header.len(), sealer.opener(&source.to_bytes(), &sealed.seal)?, true);
    Ok(Sealed { header, body: sealed.body.into(), opened })
}

/// The bytes of a seal of an epoch.
pub(crate) fn encode_seal(source: &Source, next: u64) -> Bytes {
    encode(source, Kind::Seal, next, 0, [0; Seal::LEN], &[])
}

fn encode(source: &Source, kind: Kind, next: u64, protection: u8, seal: [u8; Seal::LEN], sealed: &[u8]) -> Bytes {
    let mut bytes = vec![0; CLEAR_LEN];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAGIC);
    put(12, &(kind as u32).to_le_bytes());
    put(16, &source.group);
    put(32, &source.epoch.to_le_bytes());
    put(40, &source.number.to_le_bytes());
    put(48, &next.to_le_bytes());
    put(56, &(sealed.len() as u32).to_le_bytes());
    put(60, &[protection, source.family as u8]);
    put(64, &seal);
    bytes.extend_from_slice(sealed);
    let crc = crc32c(&bytes[12..]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    bytes.into()
}

/// How long both headers are, told by the first bytes. `None`: this is no object of a volume.
pub(crate) fn header_len(start: &[u8]) -> Option<usize> {
    if start.len() < CLEAR_LEN || start[..8] != MAGIC {
        return None;
    }
    let len = CLEAR_LEN + u32_at(start, 56) as usize;
    (len <= HEADER_MAX).then_some(len.next_multiple_of(ALIGNMENT))
}

fn damaged(source: &Source, why: &'static str) -> VolumeError {
    VolumeError::ObjectDamaged { object: source.path(), why }
}

/// Reads the header in clear, of which only the name is checked yet.
fn clear(bytes: &[u8], source: &Source) -> Result<Clear, VolumeError> {
    header_len(bytes).ok_or_else(|| damaged(source, "it is no object of a volume"))?;
    let name = (array_at::<16>(bytes, 16), u64_at(bytes, 32), u64_at(bytes, 40), bytes[61]);
    if name != (source.group, source.epoch, source.number, source.family as u8) {
        return Err(damaged(source, "it belongs to another volume or place"));
    }
    let seal = Seal::from_bytes(&array_at(bytes, 64));
    let (kind, next, sealed_len) = (u32_at(bytes, 12), u64_at(bytes, 48), u32_at(bytes, 56) as usize);
    Ok(Clear { kind, next, sealed_len, protection: bytes[60], seal })
}

impl Clear {
    fn opened(&self, sealer: &Sealer, source: &Source) -> Result<Opened, VolumeError> {
        if self.protection != sealer.protection() as u8 {
            return Err(damaged(source, "it is not sealed as this volume's objects are"));
        }
        let opener =
            sealer.opener(&source.to_bytes(), &self.seal).map_err(|_| damaged(source, "it was sealed with another key"))?;
        Ok(Opened::new((CLEAR_LEN + self.sealed_len).next_multiple_of(ALIGNMENT), opener, false))
    }
}

/// Opens an object for reading frames. `bytes` are its first [`CLEAR_LEN`] at least. What the sealed part says stays unknown.
pub(crate) fn open_body(bytes: &[u8], sealer: &Sealer, source: &Source) -> Result<Opened, VolumeError> {
    clear(bytes, source)?.opened(sealer, source)
}

/// An object of which everything but the body has been checked.
pub(crate) enum Object {
    Seal { next: u64 },
    Sealed { kind: u32, inner: Vec<u8>, opened: Opened },
}

/// Checks the headers of an object, of which `bytes` holds [`header_len`] at least.
pub(crate) fn open(bytes: &[u8], sealer: &Sealer, source: &Source) -> Result<Object, VolumeError> {
    let clear = clear(bytes, source)?;
    let header = bytes.get(..CLEAR_LEN + clear.sealed_len).ok_or_else(|| damaged(source, "it ends within its header"))?;
    if crc32c(&header[12..]) != u32_at(header, 8) {
        return Err(damaged(source, "the checksum of its header is wrong"));
    }
    if clear.kind == Kind::Seal as u32 {
        return Ok(Object::Seal { next: clear.next });
    }
    let opened = clear.opened(sealer, source)?;
    let inner = opened.opener.open_header(&header[CLEAR_LEN..]).map_err(|_| damaged(source, "its seal is broken"))?;
    opened.prove();
    Ok(Object::Sealed { kind: clear.kind, inner, opened })
}
