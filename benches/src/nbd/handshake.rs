//! Connecting: fixed newstyle, optionally structured replies, then GO.

use std::fmt;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::wire::*;

/// Longest wait for any reply.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Longest option reply believed.
const OPTION_REPLY_MAX: u32 = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Tcp(String),
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", host)) => Ok(Self::Tcp(host.into())),
            _ => bail!("address {text}: neither unix:PATH nor tcp:HOST:PORT"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(out, "unix:{}", path.display()),
            Self::Tcp(host) => write!(out, "tcp:{host}"),
        }
    }
}

/// A connection in its transmission phase.
pub struct Connection {
    pub socket: OwnedFd,
    pub size: u64,
    pub structured: bool,
}

impl Connection {
    pub fn open(address: &Address, export: &str, structured: bool) -> Result<Self> {
        let refused = || format!("connect to the NBD server at {address}");
        match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).with_context(refused)?;
                stream.set_read_timeout(Some(TIMEOUT))?;
                Self::negotiate(stream, export, structured)
            }
            Address::Tcp(host) => {
                let stream = TcpStream::connect(host).with_context(refused)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(TIMEOUT))?;
                Self::negotiate(stream, export, structured)
            }
        }
        .with_context(|| format!("negotiate export '{export}' with the NBD server at {address}"))
    }

    pub fn negotiate<S: Read + Write + Into<OwnedFd>>(mut stream: S, export: &str, structured: bool) -> Result<Self> {
        greet(&mut stream)?;
        let structured = structured && offer_structured_replies(&mut stream)?;
        let size = go(&mut stream, export)?;
        Ok(Self { socket: stream.into(), size, structured })
    }
}

fn greet(stream: &mut (impl Read + Write)) -> Result<()> {
    ensure!(read_u64(stream)? == NBDMAGIC, "the server does not speak NBD");
    ensure!(read_u64(stream)? == IHAVEOPT, "the server speaks oldstyle NBD only");
    let flags = u16::from_be_bytes(read_array(stream)?);
    ensure!(flags & FLAG_FIXED_NEWSTYLE != 0, "the server lacks fixed newstyle negotiation");
    let answer = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    stream.write_all(&answer.to_be_bytes())?;
    Ok(())
}

fn offer_structured_replies(stream: &mut (impl Read + Write)) -> Result<bool> {
    send_option(stream, OPT_STRUCTURED_REPLY, &[])?;
    let (kind, _) = read_option_reply(stream, OPT_STRUCTURED_REPLY)?;
    Ok(kind == REP_ACK)
}

/// Returns the size of the export.
fn go(stream: &mut (impl Read + Write), export: &str) -> Result<u64> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&0u16.to_be_bytes());
    send_option(stream, OPT_GO, &data)?;
    let mut size = None;
    loop {
        match read_option_reply(stream, OPT_GO)? {
            (REP_ACK, _) => return size.context("the server sent no size"),
            (REP_INFO, info) if info.len() >= 12 && info[..2] == INFO_EXPORT.to_be_bytes() => {
                size = info[2..10].try_into().ok().map(u64::from_be_bytes);
            }
            (REP_INFO, _) => {}
            (kind, text) if kind & REP_ERROR != 0 => {
                bail!("refused with error {}: {}", kind & !REP_ERROR, String::from_utf8_lossy(&text))
            }
            (kind, _) => bail!("unexpected option reply {kind}"),
        }
    }
}

fn send_option(stream: &mut impl Write, option: u32, data: &[u8]) -> Result<()> {
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)?;
    Ok(())
}

fn read_option_reply(stream: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>)> {
    ensure!(read_u64(stream)? == OPTION_REPLY_MAGIC, "bad magic in an option reply");
    ensure!(read_u32(stream)? == option, "a reply to an option that was not sent");
    let kind = read_u32(stream)?;
    let length = read_u32(stream)?;
    ensure!(length <= OPTION_REPLY_MAX, "an option reply of {length} bytes");
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

fn read_array<const N: usize>(stream: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).context("read from the server")?;
    Ok(bytes)
}

fn read_u64(stream: &mut impl Read) -> Result<u64> {
    read_array(stream).map(u64::from_be_bytes)
}

fn read_u32(stream: &mut impl Read) -> Result<u32> {
    read_array(stream).map(u32::from_be_bytes)
}
