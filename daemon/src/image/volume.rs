//! A volume of a daemon on this host, over the private NBD socket of a transfer.
//!
//! Speaks what our own server speaks: fixed newstyle, extended headers, `base:allocation`. A connection carries one request at a
//! time; as many are opened as there are requests at once.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nbd::protocol::{
    ALLOCATION_CONTEXT, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_MAX,
    SERVER_MAGIC, allocation, chunk, client_flag, command, command_flag, info, option, option_reply,
};
use parking_lot::Mutex;

use super::disk::{Disk, Run};

/// The longest reply to an option, and list of extents, that is believed.
const ANSWER_MAX: u64 = 16 << 20;
/// One request to write zeroes, so that progress shows and other requests get their turn.
const ZERO_MAX: u64 = 256 << 20;

pub struct Volume {
    name: String,
    socket: PathBuf,
    export: String,
    size: u64,
    idle: Mutex<Vec<Connection>>,
}

impl Volume {
    /// `name` is for messages.
    pub fn connect(name: &str, socket: &Path, export: &str) -> io::Result<Volume> {
        let (connection, size) = Connection::open(socket, export)?;
        Ok(Volume {
            name: name.to_owned(),
            socket: socket.to_owned(),
            export: export.to_owned(),
            size,
            idle: Mutex::new(vec![connection]),
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Connection) -> io::Result<T>) -> io::Result<T> {
        let idle = self.idle.lock().pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => Connection::open(&self.socket, &self.export)?.0,
        };
        let result = work(&mut connection).map_err(hung_up);
        if !connection.broken {
            self.idle.lock().push(connection);
        }
        result
    }
}

impl Disk for Volume {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn runs(&self, offset: u64, len: u64) -> io::Result<Vec<Run>> {
        self.with(|connection| connection.block_status(offset, len))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        for part in buffer.chunks_mut(PAYLOAD_MAX as usize) {
            self.with(|connection| connection.read(at, part))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for part in data.chunks(PAYLOAD_MAX as usize) {
            self.with(|connection| connection.plain(command::WRITE, command_flag::PAYLOAD_LEN, at, part.len() as u64, part))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZERO_MAX);
            self.with(|connection| connection.plain(command::WRITE_ZEROES, 0, offset + done, part, &[]))?;
            done += part;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|connection| connection.plain(command::FLUSH, 0, 0, 0, &[]))
    }
}

/// Says who hung up, where the system's words do not.
pub(in crate::image) fn hung_up(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ (io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            io::Error::new(kind, "the daemon closed the connection: it ended, or gave the copy up")
        }
        _ => error,
    }
}

/// One conversation with the server.
struct Connection {
    stream: UnixStream,
    cookie: u64,
    /// It may hold half an answer, and is not used again.
    broken: bool,
}

/// The header of a piece of an answer.
struct Chunk {
    done: bool,
    kind: u16,
    len: u64,
}

fn confused(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the daemon's NBD server is not understood: {what}"))
}

impl Connection {
    /// Negotiates; also returns the size of the export.
    fn open(socket: &Path, export: &str) -> io::Result<(Connection, u64)> {
        let stream = UnixStream::connect(socket)?;
        let mut connection = Connection { stream, cookie: 0, broken: false };
        let size = connection.negotiate(export)?;
        Ok((connection, size))
    }

    fn negotiate(&mut self, export: &str) -> io::Result<u64> {
        let greeting: [u8; 18] = self.take()?;
        if greeting[..8] != SERVER_MAGIC.to_be_bytes() || greeting[8..16] != OPTION_MAGIC.to_be_bytes() {
            return Err(confused("its greeting"));
        }
        let flags = client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES;
        self.stream.write_all(&flags.to_be_bytes())?;
        self.ask(option::EXTENDED_HEADERS, &[])?;
        let mut name = (export.len() as u32).to_be_bytes().to_vec();
        name.extend(export.as_bytes());
        let mut contexts = name.clone();
        contexts.extend(1u32.to_be_bytes());
        contexts.extend((ALLOCATION_CONTEXT.len() as u32).to_be_bytes());
        contexts.extend(ALLOCATION_CONTEXT.as_bytes());
        self.ask(option::SET_META_CONTEXT, &contexts)?;
        name.extend(0u16.to_be_bytes());
        let answers = self.ask(option::GO, &name)?;
        let size = answers.iter().find_map(|answer| {
            let (kind, rest) = answer.split_first_chunk()?;
            let (size, _) = rest.split_first_chunk()?;
            (u16::from_be_bytes(*kind) == info::EXPORT).then(|| u64::from_be_bytes(*size))
        });
        size.ok_or_else(|| confused("it tells no size"))
    }

    /// Asks for an option; returns what was answered before the acknowledgement.
    fn ask(&mut self, option: u32, data: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut request = OPTION_MAGIC.to_be_bytes().to_vec();
        request.extend(option.to_be_bytes());
        request.extend((data.len() as u32).to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        let mut answers = Vec::new();
        loop {
            let magic = u64::from_be_bytes(self.take()?);
            let (_, kind) = (self.take::<4>()?, u32::from_be_bytes(self.take()?));
            let len = u64::from(u32::from_be_bytes(self.take()?));
            if magic != OPTION_REPLY_MAGIC || len > ANSWER_MAX {
                return Err(confused("an option's answer"));
            }
            let answer = self.take_vec(len)?;
            match kind {
                option_reply::ACK => return Ok(answers),
                option_reply::INFO | option_reply::META_CONTEXT => answers.push(answer),
                _ => return Err(io::Error::other(format!("export refused: {}", String::from_utf8_lossy(&answer)))),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn take_vec(&mut self, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn send(&mut self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        // Until the whole answer has been read.
        self.broken = true;
        let mut header = Vec::with_capacity(32);
        header.extend(EXTENDED_REQUEST_MAGIC.to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(command.to_be_bytes());
        header.extend(self.cookie.to_be_bytes());
        header.extend(offset.to_be_bytes());
        header.extend(len.to_be_bytes());
        self.stream.write_all(&header)?;
        self.stream.write_all(payload)
    }

    /// The next piece of an answer. A failure that the server reports is taken in whole, so the connection stays good.
    fn chunk(&mut self) -> io::Result<Chunk> {
        let header: [u8; 32] = self.take()?;
        let field =
            |from: usize, len: usize| header[from..from + len].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        if field(0, 4) != u64::from(EXTENDED_REPLY_MAGIC) || field(8, 8) != self.cookie {
            return Err(confused("an answer to nothing that was asked"));
        }
        let chunk = Chunk { done: field(4, 2) as u16 & chunk::FLAG_DONE != 0, kind: field(6, 2) as u16, len: field(24, 8) };
        if chunk.kind & (1 << 15) == 0 {
            return Ok(chunk);
        }
        if !(4..=ANSWER_MAX).contains(&chunk.len) {
            return Err(confused("an error of no length"));
        }
        let body = self.take_vec(chunk.len)?;
        self.broken = !chunk.done;
        Err(io::Error::from_raw_os_error(i32::from_be_bytes([body[0], body[1], body[2], body[3]])))
    }

    /// A request whose answer holds nothing but success.
    fn plain(&mut self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> io::Result<()> {
        self.send(command, flags, offset, len, payload)?;
        let chunk = self.chunk()?;
        if chunk.kind != chunk::NONE || !chunk.done || chunk.len != 0 {
            return Err(confused("an answer of the wrong kind"));
        }
        self.broken = false;
        Ok(())
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.send(command::READ, command_flag::DF, offset, buffer.len() as u64, &[])?;
        let chunk = self.chunk()?;
        let hole = chunk.kind == chunk::OFFSET_HOLE;
        let len = if hole { 12 } else { 8 + buffer.len() as u64 };
        if !(hole || chunk.kind == chunk::OFFSET_DATA) || !chunk.done || chunk.len != len {
            return Err(confused("data of the wrong kind or length"));
        }
        if u64::from_be_bytes(self.take()?) != offset {
            return Err(confused("data of another place"));
        }
        if !hole {
            self.stream.read_exact(buffer)?;
        } else if u32::from_be_bytes(self.take()?) as usize == buffer.len() {
            buffer.fill(0);
        } else {
            return Err(confused("a hole of another length"));
        }
        self.broken = false;
        Ok(())
    }

    fn block_status(&mut self, offset: u64, len: u64) -> io::Result<Vec<Run>> {
        self.send(command::BLOCK_STATUS, 0, offset, len, &[])?;
        let chunk = self.chunk()?;
        if chunk.kind != chunk::BLOCK_STATUS_EXT || !chunk.done || !(24..=ANSWER_MAX).contains(&chunk.len) {
            return Err(confused("a block status of the wrong kind"));
        }
        let body = self.take_vec(chunk.len)?;
        self.broken = false;
        let mut left = len;
        let mut runs: Vec<Run> = Vec::new();
        for extent in body[8..].chunks_exact(16) {
            let field = |at: usize| extent[at..at + 8].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            let (found, zero) = (field(0).min(left), field(8) & u64::from(allocation::ZERO) != 0);
            left -= found;
            match runs.last_mut() {
                _ if found == 0 => {}
                Some(last) if last.zero == zero => last.len += found,
                _ => runs.push(Run { len: found, zero }),
            }
        }
        if runs.is_empty() { Err(confused("an empty block status")) } else { Ok(runs) }
    }
}
