//! The numbers of the NBD protocol, named as in its specification, and the encodings of the transmission phase.
//!
//! Everything on the wire is big-endian. With extended headers every header is 32 bytes long and lengths have 64 bits:
//!
//! ```text
//!  compact request   magic:32 flags:16 command:16 cookie:64 offset:64 length:32
//!  extended request  magic:32 flags:16 command:16 cookie:64 offset:64 length:64
//!  simple reply      magic:32 error:32 cookie:64
//!  structured chunk  magic:32 flags:16 type:16 cookie:64 length:32
//!  extended chunk    magic:32 flags:16 type:16 cookie:64 offset:64 length:64
//! ```

use blockdev::Errno;

/// "NBDMAGIC", the first thing a server says.
pub const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", before the handshake flags and before each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The longest string of the protocol, in bytes.
pub const STRING_MAX: usize = 4096;
/// The largest payload served in one request, in bytes; advertised to clients.
pub const PAYLOAD_MAX: u64 = 32 << 20;
/// The metadata context that every export has.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Its identifier in replies. Those of an export's own contexts follow.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

/// Flags of the server's greeting.
pub mod handshake_flag {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Flags of the client's answer to the greeting.
pub mod client_flag {
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// Flags that tell a client what an export can do.
pub mod transmission_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// What a client can ask for during negotiation.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// How the server answers an option.
pub mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Pieces of information about an export.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Requests of the transmission phase.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of structured and extended replies.
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) + 1;
    /// The flag of the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1;
}

/// Status flags of `base:allocation`.
pub mod allocation {
    pub const HOLE: u32 = 1 << 0;
    pub const ZERO: u32 = 1 << 1;
}

/// The status flag of an export's own contexts, as QEMU's dirty bitmaps have it.
pub const MARKED: u32 = 1 << 0;

/// The error numbers the protocol knows.
pub mod error {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// The protocol's number for an error of the data plane.
pub fn error_number(errno: Errno) -> u32 {
    match errno.raw() {
        libc::EPERM | libc::EROFS | libc::EACCES => error::EPERM,
        libc::ENOMEM => error::ENOMEM,
        libc::EINVAL => error::EINVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => error::ENOSPC,
        libc::EOVERFLOW => error::EOVERFLOW,
        libc::EOPNOTSUPP => error::ENOTSUP,
        libc::ESHUTDOWN => error::ESHUTDOWN,
        _ => error::EIO,
    }
}

/// What was negotiated about the encoding of the transmission phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Headers {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl Headers {
    /// Length of a request header.
    pub fn request_len(self) -> usize {
        if self == Headers::Extended { REQUEST_HEADER_MAX } else { 28 }
    }
}

/// The length of the longest request header.
pub const REQUEST_HEADER_MAX: usize = 32;
/// The length of the longest encoding of [`Reply`].
pub const REPLY_HEADER_MAX: usize = 48;

/// The header of a request, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u64,
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

impl RequestHeader {
    /// Decodes the `headers.request_len()` bytes of a header; `None` if its magic number is wrong.
    pub fn decode(bytes: &[u8], headers: Headers) -> Option<RequestHeader> {
        let (magic, len) = match headers {
            Headers::Extended => (EXTENDED_REQUEST_MAGIC, be64(bytes, 24)),
            _ => (REQUEST_MAGIC, u64::from(be32(bytes, 24))),
        };
        if be32(bytes, 0) != magic {
            return None;
        }
        let (flags, command) = (be16(bytes, 4), be16(bytes, 6));
        Some(RequestHeader { flags, command, cookie: be64(bytes, 8), offset: be64(bytes, 16), len })
    }

    /// Bytes of payload that follow the header. With extended headers a flag says so; QEMU (10.0) leaves it out of its writes,
    /// which have payload all the same.
    pub fn payload_len(&self, headers: Headers) -> u64 {
        let flagged = headers == Headers::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        if flagged || self.command == command::WRITE { self.len } else { 0 }
    }
}

/// The fixed part of a reply; a read's data or the list of extents follows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    Done,
    /// One of [`error`].
    Error(u32),
    /// This many bytes read at the request's offset follow.
    Data(u64),
    /// This many bytes read at the request's offset are all zero; none follow. Simple replies have no such thing.
    Zeroes(u32),
    /// This many extents of a metadata context follow, each 8 bytes long, or 16 with extended headers.
    Extents {
        context: u32,
        count: u32,
        /// No chunk of another context follows.
        is_last: bool,
    },
}

impl Reply {
    /// Encodes the reply to the request `cookie`, `offset` and returns its length.
    pub fn encode(self, headers: Headers, cookie: u64, offset: u64, out: &mut [u8; REPLY_HEADER_MAX]) -> usize {
        let mut writer = Writer { out, len: 0 };
        match (headers, self) {
            (Headers::Simple, _) | (Headers::Structured, Reply::Done) => {
                writer.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                let number = if let Reply::Error(number) = self { number } else { 0 };
                writer.put(&number.to_be_bytes());
                writer.put(&cookie.to_be_bytes());
            }
            _ => self.encode_chunk(headers, cookie, offset, &mut writer),
        }
        writer.len
    }

    fn encode_chunk(self, headers: Headers, cookie: u64, offset: u64, writer: &mut Writer<'_>) {
        let extended = headers == Headers::Extended;
        let (kind, len) = match self {
            Reply::Done | Reply::Data(0) => (chunk::NONE, 0),
            Reply::Error(_) => (chunk::ERROR, 6),
            Reply::Data(len) => (chunk::OFFSET_DATA, 8 + len),
            Reply::Zeroes(_) => (chunk::OFFSET_HOLE, 12),
            Reply::Extents { count, .. } if extended => (chunk::BLOCK_STATUS_EXT, 8 + 16 * u64::from(count)),
            Reply::Extents { count, .. } => (chunk::BLOCK_STATUS, 4 + 8 * u64::from(count)),
        };
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        writer.put(&magic.to_be_bytes());
        let goes_on = matches!(self, Reply::Extents { is_last: false, .. });
        writer.put(&(if goes_on { 0 } else { chunk::FLAG_DONE }).to_be_bytes());
        writer.put(&kind.to_be_bytes());
        writer.put(&cookie.to_be_bytes());
        if extended {
            writer.put(&offset.to_be_bytes());
            writer.put(&len.to_be_bytes());
        } else {
            writer.put(&(len as u32).to_be_bytes());
        }
        match self {
            Reply::Error(number) => {
                writer.put(&number.to_be_bytes());
                writer.put(&0u16.to_be_bytes());
            }
            Reply::Data(len) if len > 0 => writer.put(&offset.to_be_bytes()),
            Reply::Zeroes(len) => {
                writer.put(&offset.to_be_bytes());
                writer.put(&len.to_be_bytes());
            }
            Reply::Extents { context, count, .. } => {
                writer.put(&context.to_be_bytes());
                if extended {
                    writer.put(&count.to_be_bytes());
                }
            }
            _ => {}
        }
    }
}

struct Writer<'a> {
    out: &'a mut [u8; REPLY_HEADER_MAX],
    len: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_decode() {
        let mut bytes = Vec::new();
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend(command_flag::FUA.to_be_bytes());
        bytes.extend(command::WRITE.to_be_bytes());
        bytes.extend(7u64.to_be_bytes());
        bytes.extend((1u64 << 40).to_be_bytes());
        bytes.extend(512u32.to_be_bytes());
        let header = RequestHeader::decode(&bytes, Headers::Simple).unwrap();
        assert_eq!(header, RequestHeader { flags: 1, command: 1, cookie: 7, offset: 1 << 40, len: 512 });
        assert_eq!(header.payload_len(Headers::Structured), 512);
        bytes.extend([0; 4]);
        assert_eq!(RequestHeader::decode(&bytes, Headers::Extended), None);
        bytes.splice(0..4, EXTENDED_REQUEST_MAGIC.to_be_bytes());
        let header = RequestHeader::decode(&bytes, Headers::Extended).unwrap();
        assert_eq!(header.len, 512 << 32);
        assert_eq!(header.payload_len(Headers::Extended), 512 << 32);
        let trim = RequestHeader { command: command::TRIM, ..header };
        assert_eq!(trim.payload_len(Headers::Extended), 0);
    }

    #[test]
    fn replies_have_the_lengths_they_announce() {
        let mut out = [0; REPLY_HEADER_MAX];
        let mut encode = |reply: Reply, headers| reply.encode(headers, 1, 2, &mut out);
        assert_eq!(encode(Reply::Data(4096), Headers::Simple), 16);
        assert_eq!(encode(Reply::Error(5), Headers::Simple), 16);
        assert_eq!(encode(Reply::Done, Headers::Structured), 16);
        assert_eq!(encode(Reply::Error(5), Headers::Structured), 20 + 6);
        assert_eq!(encode(Reply::Data(4096), Headers::Structured), 20 + 8);
        assert_eq!(encode(Reply::Data(0), Headers::Structured), 20);
        assert_eq!(encode(Reply::Zeroes(4096), Headers::Structured), 20 + 12);
        assert_eq!(encode(Reply::Zeroes(4096), Headers::Extended), 32 + 12);
        let extents = Reply::Extents { context: 1, count: 3, is_last: true };
        assert_eq!(encode(extents, Headers::Structured), 20 + 4);
        assert_eq!(encode(Reply::Done, Headers::Extended), 32);
        assert_eq!(encode(Reply::Error(5), Headers::Extended), 32 + 6);
        assert_eq!(encode(Reply::Data(4096), Headers::Extended), 32 + 8);
        assert_eq!(encode(extents, Headers::Extended), 32 + 8);
        assert_eq!(be64(&out, 24), 8 + 3 * 16);
    }

    #[test]
    fn unknown_errors_become_eio() {
        assert_eq!(error_number(Errno::from_raw(libc::ENODEV)), error::EIO);
        assert_eq!(error_number(Errno::from_raw(libc::EDQUOT)), error::ENOSPC);
        assert_eq!(error_number(Errno::EOPNOTSUPP), error::ENOTSUP);
    }
}
