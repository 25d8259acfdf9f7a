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
const COMMAND_WRITE: u16 = 1;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_TRIM: u16 = 4;
/// The length of a request is that of its payload.
const FLAG_PAYLOAD_LENGTH: u16 = 1 << 5;
const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_ERROR: u16 = (1 << 15) + 1;

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

    /// Makes a request without an answer of its own, and waits until it is done; the NBD error number, 0 for success.
    fn request(&mut self, (flags, command): (u16, u16), offset: u64, length: u64, payload: &[u8]) -> Result<u32> {
        let cookie = 1u64;
        let words = [cookie, offset, length].map(u64::to_be_bytes).concat();
        let head = [&REQUEST_MAGIC.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
        self.stream.write_all(&[&head, &words, payload].concat()).with_context(|| format!("sending command {command}"))?;
        let magic = u32::from_be_bytes(self.receive()?);
        let [flags, kind] = [self.receive()?, self.receive()?].map(u16::from_be_bytes);
        let [answered, _, length] = [self.receive()?, self.receive()?, self.receive()?].map(u64::from_be_bytes);
        let good = (magic, flags, answered) == (REPLY_MAGIC, CHUNK_DONE, cookie) && length < 8192;
        ensure!(good, "command {command} was answered with {magic:#x}, flags {flags}, type {kind:#x}, {length} bytes");
        let mut answer = vec![0; usize::try_from(length)?];
        self.stream.read_exact(&mut answer)?;
        match (kind, answer.first_chunk()) {
            (CHUNK_NONE, None) => Ok(0),
            (CHUNK_ERROR, Some(error)) if *error != [0; 4] => Ok(u32::from_be_bytes(*error)),
            _ => anyhow::bail!("command {command} was answered with type {kind:#x}: {answer:?}"),
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
