//! The reply stream, taken apart as it arrives: headers, and pieces of payload that are seen once and dropped.
//!
//! [`Parser::feed`] consumes what it can and leaves an incomplete header for the next call; payload of any length is
//! consumed in whatever pieces it comes.

use anyhow::{Result, bail, ensure};

use super::wire::*;

const SIMPLE_LEN: usize = 16;
const CHUNK_LEN: usize = 20;
/// The longest header that must be seen in one piece.
pub const HEADER_MAX: usize = CHUNK_LEN + 12;

/// Receives what the parser finds.
pub trait Sink {
    /// The length of the read in flight under this cookie; `None` if it is a write, an error if there is no such request.
    fn read_length(&self, cookie: u64) -> Result<Option<u32>>;
    /// A piece of the data of a read, `position` bytes from its start for a simple reply.
    fn data(&mut self, cookie: u64, at: Position, bytes: &[u8]) -> Result<()>;
    fn hole(&mut self, cookie: u64, offset: u64, length: u32) -> Result<()>;
    fn done(&mut self, cookie: u64) -> Result<()>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Bytes from the start of the request.
    InRequest(u64),
    /// Bytes from the start of the export.
    InExport(u64),
}

impl Position {
    fn advance(self, bytes: usize) -> Self {
        match self {
            Self::InRequest(position) => Self::InRequest(position + bytes as u64),
            Self::InExport(position) => Self::InExport(position + bytes as u64),
        }
    }
}

struct Payload {
    cookie: u64,
    at: Position,
    left: usize,
    done: bool,
}

#[derive(Default)]
pub struct Parser {
    structured: bool,
    payload: Option<Payload>,
}

impl Parser {
    pub fn new(structured: bool) -> Self {
        Self { structured, payload: None }
    }

    /// Consumes replies from the front of `bytes` and returns how many bytes are used up.
    pub fn feed(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize> {
        let mut used = 0;
        loop {
            let rest = &bytes[used..];
            if let Some(payload) = &mut self.payload {
                let take = payload.left.min(rest.len());
                if take > 0 {
                    sink.data(payload.cookie, payload.at, &rest[..take])?;
                    payload.at = payload.at.advance(take);
                    payload.left -= take;
                    used += take;
                }
                if payload.left > 0 {
                    return Ok(used);
                }
                let (cookie, done) = (payload.cookie, payload.done);
                self.payload = None;
                if done {
                    sink.done(cookie)?;
                }
                continue;
            }
            match self.header(rest, sink)? {
                0 => return Ok(used),
                length => used += length,
            }
        }
    }

    /// Consumes one header and returns its length, 0 if it is not all there yet.
    fn header(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize> {
        if bytes.len() < SIMPLE_LEN {
            return Ok(0);
        }
        match u32_at(bytes, 0) {
            SIMPLE_REPLY_MAGIC => self.simple(bytes, sink),
            STRUCTURED_REPLY_MAGIC if self.structured => self.chunk(bytes, sink),
            magic => bail!("bad reply magic {magic:#x}"),
        }
    }

    fn simple(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize> {
        let (error, cookie) = (u32_at(bytes, 4), u64_at(bytes, 8));
        ensure!(error == 0, "request {cookie} failed with NBD error {error}");
        let length = sink.read_length(cookie)?;
        ensure!(!self.structured || length.is_none(), "a simple reply to a read after structured replies were agreed");
        let left = length.unwrap_or(0) as usize;
        self.payload = Some(Payload { cookie, at: Position::InRequest(0), left, done: true });
        Ok(SIMPLE_LEN)
    }

    fn chunk(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize> {
        if bytes.len() < CHUNK_LEN {
            return Ok(0);
        }
        let (flags, kind) = (u16_at(bytes, 4), u16_at(bytes, 6));
        let (cookie, length) = (u64_at(bytes, 8), u32_at(bytes, 16) as usize);
        let done = flags & REPLY_FLAG_DONE != 0;
        sink.read_length(cookie)?;
        let (header, left, at) = match kind {
            REPLY_NONE => {
                ensure!(length == 0, "an empty chunk of {length} bytes");
                (CHUNK_LEN, 0, 0)
            }
            REPLY_OFFSET_DATA => {
                ensure!(length > 8, "a data chunk of {length} bytes");
                if bytes.len() < CHUNK_LEN + 8 {
                    return Ok(0);
                }
                (CHUNK_LEN + 8, length - 8, u64_at(bytes, CHUNK_LEN))
            }
            REPLY_OFFSET_HOLE => {
                ensure!(length == 12, "a hole chunk of {length} bytes");
                if bytes.len() < CHUNK_LEN + 12 {
                    return Ok(0);
                }
                sink.hole(cookie, u64_at(bytes, CHUNK_LEN), u32_at(bytes, CHUNK_LEN + 8))?;
                (CHUNK_LEN + 12, 0, 0)
            }
            kind if kind & REPLY_ERROR != 0 => {
                let error = bytes.get(CHUNK_LEN..CHUNK_LEN + 4).map_or(0, |_| u32_at(bytes, CHUNK_LEN));
                bail!("request {cookie} failed with NBD error {error}")
            }
            kind => bail!("a chunk of unknown type {kind}"),
        };
        self.payload = Some(Payload { cookie, at: Position::InExport(at), left, done });
        Ok(header)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const READ: u64 = 1;
    const WRITE: u64 = 2;

    #[derive(Default, PartialEq, Debug)]
    struct Seen {
        data: Vec<(u64, Position, Vec<u8>)>,
        holes: Vec<(u64, u64, u32)>,
        done: Vec<u64>,
    }

    impl Sink for Seen {
        fn read_length(&self, cookie: u64) -> Result<Option<u32>> {
            match cookie {
                READ => Ok(Some(10)),
                WRITE => Ok(None),
                other => bail!("no request {other}"),
            }
        }

        fn data(&mut self, cookie: u64, at: Position, bytes: &[u8]) -> Result<()> {
            match self.data.last_mut() {
                Some((last, start, data)) if *last == cookie && start.advance(data.len()) == at => data.extend(bytes),
                _ => self.data.push((cookie, at, bytes.to_vec())),
            }
            Ok(())
        }

        fn hole(&mut self, cookie: u64, offset: u64, length: u32) -> Result<()> {
            self.holes.push((cookie, offset, length));
            Ok(())
        }

        fn done(&mut self, cookie: u64) -> Result<()> {
            self.done.push(cookie);
            Ok(())
        }
    }

    fn simple(error: u32, cookie: u64) -> Vec<u8> {
        [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn structured_stream() -> Vec<u8> {
        let data = [&100u64.to_be_bytes()[..], b"abcdef"].concat();
        let hole = [&106u64.to_be_bytes()[..], &4u32.to_be_bytes()].concat();
        [
            chunk(0, REPLY_OFFSET_DATA, READ, &data),
            simple(0, WRITE),
            chunk(0, REPLY_OFFSET_HOLE, READ, &hole),
            chunk(REPLY_FLAG_DONE, REPLY_NONE, READ, &[]),
        ]
        .concat()
    }

    /// Feeds a stream as a socket would: in pieces of the given lengths, unused bytes kept in front of the next piece.
    fn feed_in_pieces(parser: &mut Parser, stream: &[u8], pieces: &[usize]) -> Result<Seen> {
        let (mut seen, mut buffer, mut rest) = (Seen::default(), Vec::new(), stream);
        let mut lengths = pieces.iter().copied().chain(std::iter::repeat(stream.len()));
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(lengths.next().unwrap_or(1).clamp(1, rest.len()));
            buffer.extend_from_slice(piece);
            rest = later;
            let used = parser.feed(&buffer, &mut seen)?;
            buffer.drain(..used);
            assert!(buffer.len() < HEADER_MAX, "{} bytes left over", buffer.len());
        }
        Ok(seen)
    }

    proptest! {
        #[test]
        fn structured_replies_in_any_pieces(pieces in prop::collection::vec(1..30usize, 0..60)) {
            let seen = feed_in_pieces(&mut Parser::new(true), &structured_stream(), &pieces).unwrap();
            prop_assert_eq!(seen.data, [(READ, Position::InExport(100), b"abcdef".to_vec())]);
            prop_assert_eq!(seen.holes, [(READ, 106, 4)]);
            prop_assert_eq!(seen.done, [WRITE, READ]);
        }

        #[test]
        fn simple_replies_in_any_pieces(pieces in prop::collection::vec(1..30usize, 0..60)) {
            let stream = [simple(0, READ), b"0123456789".to_vec(), simple(0, WRITE)].concat();
            let seen = feed_in_pieces(&mut Parser::new(false), &stream, &pieces).unwrap();
            prop_assert_eq!(seen.data, [(READ, Position::InRequest(0), b"0123456789".to_vec())]);
            prop_assert_eq!(seen.done, [READ, WRITE]);
        }

        #[test]
        fn garbage_never_panics(stream in prop::collection::vec(any::<u8>(), 1..300), structured: bool, magic in 0..3u8) {
            let head = [[].as_slice(), &SIMPLE_REPLY_MAGIC.to_be_bytes(), &STRUCTURED_REPLY_MAGIC.to_be_bytes()];
            let stream = [head[magic as usize], &stream].concat();
            let _ = Parser::new(structured).feed(&stream, &mut Seen::default());
        }
    }

    #[test]
    fn refuses_errors_and_nonsense() {
        let mut seen = Seen::default();
        let mut feed = |structured, bytes: &[u8]| Parser::new(structured).feed(bytes, &mut seen).unwrap_err().to_string();
        assert_eq!(feed(false, &simple(5, READ)), "request 1 failed with NBD error 5");
        assert_eq!(feed(true, &chunk(1, 1 << 15 | 1, READ, &[0, 0, 0, 28, 0, 0])), "request 1 failed with NBD error 28");
        assert_eq!(feed(false, &simple(0, 77)), "no request 77");
        assert_eq!(feed(false, &chunk(1, REPLY_NONE, READ, &[])), "bad reply magic 0x668e33ef");
        assert_eq!(feed(true, &chunk(1, REPLY_OFFSET_HOLE, READ, &[0])), "a hole chunk of 1 bytes");
        assert_eq!(seen, Seen::default());
    }
}
