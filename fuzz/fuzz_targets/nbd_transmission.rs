//! The NBD transmission phase, through a real socket and a real data-plane thread: any bytes a client can send.
//!
//! Input: one byte of settings, then either raw bytes or short records that become well-framed requests. Checked: the server
//! answers in well-formed replies and closes the connection, within a time nobody should need.

#![no_main]

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use blockdev::memory_disk::MemoryDisk;
use blockdev::reactor::DataPlaneOptions;
use blockdev::{DataPlane, Volume, VolumeOptions};
use libfuzzer_sys::fuzz_target;
use nbd::protocol::{EXTENDED_REQUEST_MAGIC, Headers, REQUEST_MAGIC, command, command_flag};
use nbd::{Export, Server, ServerOptions};

const DISK_SIZE: u64 = 1 << 20;
/// Offsets and lengths of requests lie below it.
const LEN_LIMIT: usize = DISK_SIZE as usize + 4096;
const HANG: Duration = Duration::from_secs(20);

struct Rig {
    _plane: DataPlane,
    server: Server,
    exports: [Arc<Export>; 2],
}

fn rig() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(|| {
        let plane = DataPlane::start(DataPlaneOptions { threads: 1, ..Default::default() }).unwrap();
        let options = VolumeOptions { name: "disk".into(), read_only: false, block_size: 512 };
        let volume = Volume::new(Arc::new(MemoryDisk::new(DISK_SIZE, 512)), options);
        let exports = [false, true].map(|ro| Arc::new(Export::new("disk", volume.clone()).read_only(ro)));
        let server = Server::new(plane.handles(), ServerOptions::default());
        Rig { _plane: plane, server, exports }
    })
}

/// Requests from records of eight bytes: command, flags, 24 bits of offset, 24 bits of length.
fn framed(records: &[u8], headers: Headers) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, record) in records.chunks_exact(8).enumerate() {
        let extended = headers == Headers::Extended;
        let command = u16::from(record[0] % 10);
        let number24 = |at: usize| u64::from(u32::from_be_bytes([0, record[at], record[at + 1], record[at + 2]]));
        let (offset, mut len) = (number24(2) % LEN_LIMIT as u64, number24(5) % LEN_LIMIT as u64);
        let mut flags = u16::from(record[1] & 0x3f);
        let carries = command == command::WRITE || (extended && flags & command_flag::PAYLOAD_LEN != 0);
        if carries {
            len %= 10_000;
        }
        if command == command::WRITE && extended {
            flags |= command_flag::PAYLOAD_LEN;
        }
        bytes.extend(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC }.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend((number as u64).to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if extended { bytes.extend(len.to_be_bytes()) } else { bytes.extend((len as u32).to_be_bytes()) }
        if carries {
            bytes.resize(bytes.len() + len as usize, record[7]);
        }
    }
    bytes
}

/// Takes simple replies to the requests of `framed(records, Headers::Simple)` apart: each is answered once at most, with as much as was asked for.
fn check_simple(mut replies: &[u8], records: &[u8]) {
    let mut answered = HashSet::new();
    while !replies.is_empty() {
        let word = |at: usize| u32::from_be_bytes(replies[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), nbd::protocol::SIMPLE_REPLY_MAGIC);
        let number = u64::from_be_bytes(replies[8..16].try_into().unwrap()) as usize;
        assert!(answered.insert(number), "request {number} is answered twice");
        let record = &records[number * 8..number * 8 + 8];
        let has_data = word(4) == 0 && u16::from(record[0] % 10) == command::READ;
        let len = if has_data { u32::from_be_bytes([0, record[5], record[6], record[7]]) as usize % LEN_LIMIT } else { 0 };
        replies = &replies[16 + len..];
    }
}

/// Takes chunked replies apart.
fn check_chunks(mut replies: &[u8], headers: Headers) {
    let header_len = if headers == Headers::Extended { 32 } else { 20 };
    while !replies.is_empty() {
        let word = |at: usize| u32::from_be_bytes(replies[at..at + 4].try_into().unwrap());
        if word(0) == nbd::protocol::SIMPLE_REPLY_MAGIC && headers == Headers::Structured {
            assert_eq!(word(4), 0, "errors are chunks");
            replies = &replies[16..];
            continue;
        }
        let magic = if headers == Headers::Extended {
            nbd::protocol::EXTENDED_REPLY_MAGIC
        } else {
            nbd::protocol::STRUCTURED_REPLY_MAGIC
        };
        assert_eq!(word(0), magic);
        let len = word(header_len - 4) as usize;
        replies = &replies[header_len + len..];
    }
}

fuzz_target!(|data: &[u8]| {
    let [settings, rest @ ..] = data else { return };
    let headers = [Headers::Simple, Headers::Structured, Headers::Extended][usize::from(settings & 3) % 3];
    let request_bytes = if settings & 4 == 0 { framed(rest, headers) } else { rest.to_vec() };
    let rig = rig();
    let export = &rig.exports[usize::from(settings >> 3 & 1)];
    let (mut client, server) = UnixStream::pair().unwrap();
    // No negotiation gives a context to a client without structured replies.
    let allocation_context = headers != Headers::Simple && settings & 16 == 0;
    assert!(rig.server.adopt(server.into(), export, headers, allocation_context));
    client.set_read_timeout(Some(HANG)).unwrap();
    client.set_write_timeout(Some(HANG)).unwrap();
    let mut writer = client.try_clone().unwrap();
    let mut replies = Vec::new();
    let mut complete = true;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _ = writer.write_all(&request_bytes);
            let _ = writer.shutdown(Shutdown::Write);
        });
        if let Err(error) = client.read_to_end(&mut replies) {
            assert!(!matches!(error.kind(), std::io::ErrorKind::WouldBlock), "the server hangs");
            complete = false;
        }
    });
    // Only garbage is cut off in the middle of a reply.
    if complete && settings & 4 == 0 {
        match headers {
            Headers::Simple => check_simple(&replies, rest),
            Headers::Structured | Headers::Extended => check_chunks(&replies, headers),
        }
    }
});
