//! The socket of one front end: whole messages with their descriptors in, replies out. Never blocks.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use thiserror::Error;

use crate::message::{FDS_MAX, HEADER_LEN, Header, Message, MessageError, PAYLOAD_MAX};

/// Why a connection cannot go on.
#[derive(Error, Debug)]
pub enum ConnectionError {
    #[error("the front end closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("more file descriptors than any message has")]
    TooManyDescriptors,
    #[error("the front end does not read its replies")]
    NotReading,
}

/// A connected socket and the message that is arriving on it.
pub struct Connection {
    socket: OwnedFd,
    buffer: Box<[u8; HEADER_LEN + PAYLOAD_MAX]>,
    filled: usize,
    header: Option<Header>,
    fds: Vec<OwnedFd>,
}

impl Connection {
    pub fn new(socket: OwnedFd) -> Connection {
        let buffer = Box::new([0; HEADER_LEN + PAYLOAD_MAX]);
        Connection { socket, buffer, filled: 0, header: None, fds: Vec::new() }
    }

    /// The next message, or `None` until more of it has arrived.
    pub fn receive(&mut self) -> Result<Option<(Header, Message)>, ConnectionError> {
        loop {
            let wanted = HEADER_LEN + self.header.map_or(0, |header| header.size as usize);
            if self.filled < wanted {
                if !self.fill(wanted)? {
                    return Ok(None);
                }
                continue;
            }
            let Some(header) = self.header else {
                let mut bytes = [0; HEADER_LEN];
                bytes.copy_from_slice(&self.buffer[..HEADER_LEN]);
                self.header = Some(Header::parse(&bytes)?);
                continue;
            };
            let fds = std::mem::take(&mut self.fds);
            let message = Message::parse(header, &self.buffer[HEADER_LEN..wanted], fds)?;
            (self.header, self.filled) = (None, 0);
            return Ok(Some((header, message)));
        }
    }

    /// Reads on to `wanted` bytes at most; false if nothing has arrived.
    fn fill(&mut self, wanted: usize) -> Result<bool, ConnectionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let target = IoSliceMut::new(&mut self.buffer[self.filled..wanted]);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.socket, &mut [target], &mut control, flags) {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
            Err(rustix::io::Errno::CONNRESET) => return Err(ConnectionError::Closed),
            Err(error) => return Err(ConnectionError::Io(error.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > FDS_MAX {
            return Err(ConnectionError::TooManyDescriptors);
        }
        if received.bytes == 0 {
            return Err(ConnectionError::Closed);
        }
        self.filled += received.bytes;
        Ok(true)
    }

    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), ConnectionError> {
        send(self.socket.as_fd(), bytes, fd)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends a whole message or fails: a peer with a full socket buffer has stopped reading.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), ConnectionError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Err(ConnectionError::NotReading),
        Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(ConnectionError::Closed),
        Err(error) => Err(ConnectionError::Io(error.into())),
    }
}
