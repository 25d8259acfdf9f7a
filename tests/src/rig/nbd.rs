//! A small NBD client with extended headers, for what no tool at hand can do: requests longer than 4 GiB, and one connection that is told of each
//! error and goes on.

use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPTION_MAGIC: &[u8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x21e4_1c71;
const REPLY_MAGIC: u32 = 0x6e8a_278c;
/// Fixed newstyle, no zeroes.
const CLIENT_FLAGS: u32 = 3;
const OPTION_GO: u32 = 7;
const OPTION_EXTENDED_HEADERS: u32 = 11;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_TRIM: u16 = 4;
/// The length of a request is that of its payload.
const FLAG_PAYLOAD_LENGTH: u16 = 1 << 5;
const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_ERROR: u16 = (1 << 15) + 1;
const COOKIE: u64 = 1;
/// Of an answer without data.
const ANSWER_MAX: u64 = 8192;

#[derive(Debug)]
pub struct NbdClient {
    stream: UnixStream,
}

impl NbdClient {
    pub fn connect(socket: &Path, export: &str, answer_limit: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(answer_limit))?;
        let mut client = Self { stream };
        let greeting: [u8; 18] = client.receive()?;
        ensure!(greeting.starts_with(b"NBDMAGIC"), "greeted with {greeting:?}");
        client.stream.write_all(&CLIENT_FLAGS.to_be_bytes())?;
        client.option(OPTION_EXTENDED_HEADERS, &[])?;
        let length = u32::try_from(export.len())?;
        client.option(OPTION_GO, &[&length.to_be_bytes(), export.as_bytes(), &[0, 0]].concat())?;
        Ok(client)
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).context("reading from the NBD server")?;
        Ok(bytes)
    }

    /// Sends an option, which must be acknowledged; information that comes before is skipped.
    fn option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let length = u32::try_from(data.len())?;
        self.stream.write_all(&[OPTION_MAGIC, &option.to_be_bytes(), &length.to_be_bytes(), data].concat())?;
        loop {
            let magic = u64::from_be_bytes(self.receive()?);
            let [of, kind, length] = [self.receive()?, self.receive()?, self.receive()?].map(u32::from_be_bytes);
            ensure!(magic == OPTION_REPLY_MAGIC && of == option, "option {option} was answered with {magic:#x}, option {of}");
            let mut data = vec![0; usize::try_from(length)?];
            self.stream.read_exact(&mut data)?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO => {}
                _ => anyhow::bail!("option {option} was refused ({kind:#x}): {}", String::from_utf8_lossy(&data)),
            }
        }
    }

    fn send(&mut self, (flags, command): (u16, u16), offset: u64, length: u64, payload: &[u8]) -> Result<()> {
        let words = [COOKIE, offset, length].map(u64::to_be_bytes).concat();
        let head = [&REQUEST_MAGIC.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
        self.stream.write_all(&[&head, &words, payload].concat()).with_context(|| format!("sending command {command}"))
    }

    /// A chunk of the answer: flags, type, content.
    fn chunk(&mut self, length_max: u64) -> Result<(u16, u16, Vec<u8>)> {
        let magic = u32::from_be_bytes(self.receive()?);
        let [flags, kind] = [self.receive()?, self.receive()?].map(u16::from_be_bytes);
        let [answered, _, length] = [self.receive()?, self.receive()?, self.receive()?].map(u64::from_be_bytes);
        let good = (magic, answered) == (REPLY_MAGIC, COOKIE) && length < length_max;
        ensure!(good, "answered with {magic:#x}, flags {flags}, type {kind:#x}, {length} bytes");
        let mut answer = vec![0; usize::try_from(length)?];
        self.stream.read_exact(&mut answer)?;
        Ok((flags, kind, answer))
    }

    /// Makes a request without an answer of its own, and waits until it is done; the NBD error number, 0 for success.
    fn request(&mut self, (flags, command): (u16, u16), offset: u64, length: u64, payload: &[u8]) -> Result<u32> {
        self.send((flags, command), offset, length, payload)?;
        match self.chunk(ANSWER_MAX)? {
            (CHUNK_DONE, CHUNK_NONE, answer) if answer.is_empty() => Ok(0),
            (CHUNK_DONE, CHUNK_ERROR, answer) => match answer.first_chunk() {
                Some(error) if *error != [0; 4] => Ok(u32::from_be_bytes(*error)),
                _ => anyhow::bail!("command {command} was answered with an error that is none: {answer:?}"),
            },
            (flags, kind, answer) => {
                anyhow::bail!("command {command} was answered with flags {flags}, type {kind:#x}: {answer:?}")
            }
        }
    }

    /// Reads a range.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        self.send((0, COMMAND_READ), offset, length.into(), &[])?;
        let mut found = vec![0; usize::try_from(length)?];
        loop {
            let (flags, kind, answer) = self.chunk(u64::from(length) + ANSWER_MAX)?;
            match (kind, answer.split_first_chunk()) {
                (CHUNK_DATA, Some((at, data))) => {
                    let start = usize::try_from(u64::from_be_bytes(*at).wrapping_sub(offset))?;
                    let place = start.checked_add(data.len()).and_then(|end| found.get_mut(start..end));
                    place.context("bytes from outside the range")?.copy_from_slice(data);
                }
                (CHUNK_HOLE | CHUNK_NONE, _) => {}
                _ => anyhow::bail!("a read was answered with type {kind:#x}: {answer:?}"),
            }
            if flags & CHUNK_DONE != 0 {
                return Ok(found);
            }
        }
    }

    /// Discards a range in one request, and waits for the answer.
    pub fn trim(&mut self, offset: u64, length: u64) -> Result<()> {
        let error = self.request((0, COMMAND_TRIM), offset, length, &[])?;
        ensure!(error == 0, "the trim was answered with error {error}");
        Ok(())
    }

    /// Writes, and waits for the answer: the NBD error number, 0 for success.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<u32> {
        self.request((FLAG_PAYLOAD_LENGTH, COMMAND_WRITE), offset, u64::try_from(data.len())?, data)
    }

    /// Flushes, and waits for the answer: the NBD error number, 0 for success.
    pub fn flush(&mut self) -> Result<u32> {
        self.request((0, COMMAND_FLUSH), 0, 0, &[])
    }
}
