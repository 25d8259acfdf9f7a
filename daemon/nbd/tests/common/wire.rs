//! The client's side of the protocol, byte by byte.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nbd::protocol::*;

use super::HANG;

pub trait Duplex: Read + Write + Send {}
impl<T: Read + Write + Send> Duplex for T {}

pub struct Wire {
    pub stream: Box<dyn Duplex>,
    pub headers: Headers,
    next_cookie: u64,
    /// Lengths of reads not yet answered, for simple replies.
    reads: HashMap<u64, usize>,
}

pub type Extents = Vec<(u64, u64)>;

/// One complete reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Done,
    Data(Vec<u8>),
    Extents(Extents),
    Error(u32),
}

impl Wire {
    /// A client that has read the greeting and sent its flags.
    pub fn connect(path: &Path) -> Wire {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        Wire::greet(Box::new(stream))
    }

    pub fn greet(stream: Box<dyn Duplex>) -> Wire {
        let mut wire = Wire::over(stream);
        let greeting = wire.bytes(18);
        assert_eq!(greeting[..8], *b"NBDMAGIC");
        assert_eq!(greeting[8..16], *b"IHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        wire.send(&3u32.to_be_bytes());
        wire
    }

    pub fn over(stream: Box<dyn Duplex>) -> Wire {
        Wire { stream, headers: Headers::Simple, next_cookie: 1, reads: HashMap::new() }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.stream.flush().unwrap();
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        self.try_bytes(len).unwrap()
    }

    pub fn try_bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes(2).try_into().unwrap())
    }
    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).try_into().unwrap())
    }
    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes(8).try_into().unwrap())
    }

    /// True if the server has closed the connection; whatever it still said is read.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
        }
    }

    pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
        let head = [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
        [&head.concat()[..], data].concat()
    }

    /// Sends an option and returns the replies, up to an acknowledgement or an error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&Wire::option_bytes(option, data));
        self.option_replies(option)
    }

    pub fn option_replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.u64(), OPTION_REPLY_MAGIC);
            assert_eq!(self.u32(), option);
            let (kind, len) = (self.u32(), self.u32() as usize);
            replies.push((kind, self.bytes(len)));
            if kind == option_reply::ACK || kind >= 1 << 31 {
                return replies;
            }
        }
    }

    pub fn go_data(name: &str) -> Vec<u8> {
        [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &0u16.to_be_bytes()].concat()
    }

    /// The data of a request about metadata contexts.
    pub fn contexts_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let text = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
        let count = (queries.len() as u32).to_be_bytes().to_vec();
        let queries = queries.iter().map(|query| text(query));
        [text(name), count].into_iter().chain(queries).flatten().collect()
    }

    /// Chooses an export; with structured replies or extended headers, the allocation context too.
    pub fn attach(mut self, name: &str, headers: Headers) -> Wire {
        let last = |replies: Vec<(u32, Vec<u8>)>| replies.last().unwrap().0;
        match headers {
            Headers::Simple => {}
            Headers::Structured => assert_eq!(last(self.option(option::STRUCTURED_REPLY, &[])), option_reply::ACK),
            Headers::Extended => assert_eq!(last(self.option(option::EXTENDED_HEADERS, &[])), option_reply::ACK),
        }
        if headers != Headers::Simple {
            let data = Wire::contexts_data(name, &[ALLOCATION_CONTEXT]);
            assert_eq!(last(self.option(option::SET_META_CONTEXT, &data)), option_reply::ACK);
        }
        assert_eq!(last(self.option(option::GO, &Wire::go_data(name))), option_reply::ACK);
        self.headers = headers;
        self
    }

    /// The bytes of a request header, and its cookie.
    pub fn header(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> (u64, Vec<u8>) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if command == command::READ {
            self.reads.insert(cookie, len as usize);
        }
        let extended = self.headers == Headers::Extended;
        let flags = if extended && command == command::WRITE { flags | command_flag::PAYLOAD_LEN } else { flags };
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if extended {
            bytes.extend(len.to_be_bytes())
        } else {
            bytes.extend((len as u32).to_be_bytes())
        }
        (cookie, bytes)
    }

    pub fn request(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> u64 {
        let (cookie, bytes) = self.header(command, flags, offset, len);
        self.send(&bytes);
        cookie
    }

    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let (cookie, mut bytes) = self.header(command::WRITE, flags, offset, data.len() as u64);
        bytes.extend(data);
        self.send(&bytes);
        cookie
    }

    /// The next reply, whichever request it is to.
    pub fn answer(&mut self) -> (u64, Answer) {
        let magic = self.u32();
        let (cookie, answer) = match magic {
            SIMPLE_REPLY_MAGIC => {
                assert_ne!(self.headers, Headers::Extended);
                let (number, cookie) = (self.u32(), self.u64());
                match (number, self.reads.get(&cookie)) {
                    (0, Some(len)) => {
                        assert_eq!(self.headers, Headers::Simple, "reads have structured replies");
                        let len = *len;
                        (cookie, Answer::Data(self.bytes(len)))
                    }
                    (0, None) => (cookie, Answer::Done),
                    _ => (cookie, Answer::Error(number)),
                }
            }
            STRUCTURED_REPLY_MAGIC => {
                assert_eq!(self.headers, Headers::Structured);
                let (flags, kind, cookie) = (self.u16(), self.u16(), self.u64());
                let len = u64::from(self.u32());
                (cookie, self.chunk(flags, kind, len))
            }
            EXTENDED_REPLY_MAGIC => {
                assert_eq!(self.headers, Headers::Extended);
                let (flags, kind, cookie, _offset) = (self.u16(), self.u16(), self.u64(), self.u64());
                let len = self.u64();
                (cookie, self.chunk(flags, kind, len))
            }
            other => panic!("a reply begins with {other:#x}"),
        };
        self.reads.remove(&cookie);
        (cookie, answer)
    }

    fn chunk(&mut self, flags: u16, kind: u16, len: u64) -> Answer {
        assert_eq!(flags, chunk::FLAG_DONE, "each reply here is one chunk");
        match kind {
            chunk::NONE => {
                assert_eq!(len, 0);
                Answer::Done
            }
            chunk::OFFSET_DATA => {
                self.u64();
                let data = self.bytes(len as usize - 8);
                assert!(data.iter().any(|byte| *byte != 0), "zeroes were sent");
                Answer::Data(data)
            }
            chunk::OFFSET_HOLE => {
                assert_eq!(len, 12);
                self.u64();
                Answer::Data(vec![0; self.u32() as usize])
            }
            chunk::BLOCK_STATUS => {
                assert_eq!(self.u32(), ALLOCATION_CONTEXT_ID);
                Answer::Extents((0..(len - 4) / 8).map(|_| (u64::from(self.u32()), u64::from(self.u32()))).collect())
            }
            chunk::BLOCK_STATUS_EXT => {
                assert_eq!(self.u32(), ALLOCATION_CONTEXT_ID);
                let count = self.u32();
                assert_eq!(len, 8 + 16 * u64::from(count));
                Answer::Extents((0..count).map(|_| (self.u64(), self.u64())).collect())
            }
            chunk::ERROR => {
                let (number, message_len) = (self.u32(), self.u16());
                assert_eq!(len, 6 + u64::from(message_len));
                self.bytes(message_len.into());
                Answer::Error(number)
            }
            other => panic!("chunk of type {other}"),
        }
    }

    /// The chunks of one reply to BLOCK_STATUS: for each context its number and its extents.
    pub fn context_extents(&mut self, cookie: u64) -> Vec<(u32, Extents)> {
        let mut chunks = Vec::new();
        loop {
            let extended = self.headers == Headers::Extended;
            assert_eq!(self.u32(), if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC });
            let (flags, kind, answered) = (self.u16(), self.u16(), self.u64());
            assert_eq!((answered, kind), (cookie, if extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS }));
            let _offset = extended.then(|| self.u64());
            let len = if extended { self.u64() } else { u64::from(self.u32()) };
            let context = self.u32();
            let extents = match extended {
                true => (0..self.u32()).map(|_| (self.u64(), self.u64())).collect(),
                false => (0..(len - 4) / 8).map(|_| (u64::from(self.u32()), u64::from(self.u32()))).collect(),
            };
            chunks.push((context, extents));
            if flags == chunk::FLAG_DONE {
                return chunks;
            }
        }
    }

    /// The reply to the one request in flight.
    pub fn answer_to(&mut self, cookie: u64) -> Answer {
        let (answered, answer) = self.answer();
        assert_eq!(answered, cookie);
        answer
    }

    pub fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Answer {
        let cookie = self.request(command, flags, offset, len);
        self.answer_to(cookie)
    }

    pub fn read(&mut self, offset: u64, len: u64) -> Answer {
        self.ask(command::READ, 0, offset, len)
    }

    pub fn write_all(&mut self, offset: u64, data: &[u8]) -> Answer {
        let cookie = self.write(0, offset, data);
        self.answer_to(cookie)
    }

    pub fn disconnect(mut self) {
        self.request(command::DISC, 0, 0, 0);
        assert!(self.is_closed());
    }
}
