//! A front end under full control of a test: shared memory, split rings and messages made by hand. It knows the protocol from
//! its documents, and nothing of the server's code.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::time::Timespec;

/// The longest a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const MEMORY: u64 = 16 << 20;
/// Where the shared memory is in the guest, and in the front end's own (pretended) address space.
pub const GUEST: u64 = 0x1_0000_0000;
pub const USER: u64 = 0x7f00_0000_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_WCE: u64 = 1 << 11;
pub const F_LOG_ALL: u64 = 1 << 26;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_INDEX: u64 = 1 << 29;
pub const F_PROTOCOL: u64 = 1 << 30;
/// Among the protocol features.
pub const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

/// Message numbers.
pub mod req {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Memory shared with the server, standing for a guest's.
pub struct SharedMemory {
    pub file: OwnedFd,
    start: *mut u8,
    size: u64,
}

impl SharedMemory {
    pub fn new(size: u64) -> SharedMemory {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        SharedMemory::map(file, size)
    }

    pub fn map(file: OwnedFd, size: u64) -> SharedMemory {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe { mmap(std::ptr::null_mut(), size as usize, protection, MapFlags::SHARED, &file, 0) };
        SharedMemory { file, start: start.unwrap().cast(), size }
    }

    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        assert!(offset + len as u64 <= self.size);
        self.start.wrapping_add(offset as usize)
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: `at` checked the range; the server may write at the same time, which tests only allow where they do not look.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        // SAFETY: `at` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset, bytes.len()), bytes.len()) };
    }

    pub fn u16(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: `at` checked the range, offsets are even, and both sides use atomic accesses.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: made in `map`; nothing refers to it any more.
        unsafe { munmap(self.start.cast(), self.size as usize).unwrap() };
    }
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// True if `fd` becomes readable in time.
pub fn wait_readable(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
    loop {
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// A descriptor as written into a table.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A split ring; offsets are in shared memory.
pub struct Queue {
    pub index: u32,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub error: OwnedFd,
    pub seen_used: u16,
    /// Where the data of the request at each head is.
    pub data: u64,
}

/// Bytes of room for the data of one head.
pub const DATA: u64 = 64 << 10;
/// Shared memory that one queue of up to 64 descriptors takes.
pub const QUEUE_SPAN: u64 = 1 << 20;

impl Queue {
    pub fn new(index: u32, size: u16) -> Queue {
        let start = u64::from(index) * QUEUE_SPAN;
        Queue {
            index,
            size,
            desc: start,
            avail: start + 0x8000,
            used: start + 0xa000,
            kick: event(),
            call: event(),
            error: event(),
            seen_used: 0,
            data: start + 0x10000,
        }
    }

    pub fn set_desc(&self, memory: &SharedMemory, index: u16, desc: Desc) {
        memory.write(self.desc + u64::from(index) * 16, &desc.bytes());
    }

    pub fn avail_index(&self, memory: &SharedMemory) -> u16 {
        memory.u16(self.avail + 2).load(Ordering::Relaxed)
    }

    pub fn used_index(&self, memory: &SharedMemory) -> u16 {
        memory.u16(self.used + 2).load(Ordering::Acquire)
    }

    /// Makes a head available, without a kick.
    pub fn offer(&self, memory: &SharedMemory, head: u16) {
        let index = self.avail_index(memory);
        memory.u16(self.avail + 4 + 2 * u64::from(index % self.size)).store(head, Ordering::Relaxed);
        memory.u16(self.avail + 2).store(index.wrapping_add(1), Ordering::Release);
        fence(Ordering::SeqCst);
    }

    pub fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Asks to be interrupted for the next used chain.
    pub fn arm_event(&self, memory: &SharedMemory) {
        memory.u16(self.avail + 4 + 2 * u64::from(self.size)).store(self.seen_used, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The next used chain that is there already.
    pub fn take_used(&mut self, memory: &SharedMemory) -> Option<(u16, u32)> {
        if self.used_index(memory) == self.seen_used {
            return None;
        }
        let element = memory.read(self.used + 4 + 8 * u64::from(self.seen_used % self.size), 8);
        self.seen_used = self.seen_used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((word(0) as u16, word(4)))
    }

    /// The next used chain, as an interrupt-driven driver waits for it.
    pub fn wait_used(&mut self, memory: &SharedMemory) -> (u16, u32) {
        loop {
            self.arm_event(memory);
            if let Some(used) = self.take_used(memory) {
                return used;
            }
            assert!(wait_readable(self.call.as_fd(), PATIENCE), "queue {}: no interrupt came", self.index);
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
    }

    /// Writes a request as a chain of header, data and status from descriptor `head` on (three are used).
    pub fn write_request(&self, memory: &SharedMemory, head: u16, kind: u32, sector: u64, data: Data<'_>) {
        let area = self.data + u64::from(head / 3) * DATA;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write(area, &header);
        memory.write(area + 16, &[0xee]);
        let (len, flags) = match data {
            Data::Out(bytes) => {
                memory.write(area + 512, bytes);
                (bytes.len() as u32, 0)
            }
            Data::In(len) => (len as u32, WRITE),
            Data::None => (0, 0),
        };
        let guest = GUEST + area;
        let status = Desc { address: guest + 16, len: 1, flags: WRITE, next: 0 };
        if len == 0 {
            self.set_desc(memory, head, Desc { address: guest, len: 16, flags: NEXT, next: head + 2 });
        } else {
            self.set_desc(memory, head, Desc { address: guest, len: 16, flags: NEXT, next: head + 1 });
            self.set_desc(memory, head + 1, Desc { address: guest + 512, len, flags: flags | NEXT, next: head + 2 });
        }
        self.set_desc(memory, head + 2, status);
    }

    pub fn status(&self, memory: &SharedMemory, head: u16) -> u8 {
        memory.read(self.data + u64::from(head / 3) * DATA + 16, 1)[0]
    }

    pub fn read_data(&self, memory: &SharedMemory, head: u16, len: usize) -> Vec<u8> {
        memory.read(self.data + u64::from(head / 3) * DATA + 512, len)
    }

    /// One request from beginning to end; its status.
    pub fn run(&mut self, memory: &SharedMemory, kind: u32, sector: u64, data: Data<'_>) -> u8 {
        self.write_request(memory, 0, kind, sector, data);
        self.offer(memory, 0);
        self.kick();
        assert_eq!(self.wait_used(memory).0, 0);
        self.status(memory, 0)
    }
}

/// The data of a request.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    Out(&'a [u8]),
    In(usize),
    None,
}

/// A message from the server.
pub struct Reply {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    pub fn u64(&self) -> u64 {
        u64::from_ne_bytes(self.payload.as_slice().try_into().expect("a reply of eight bytes"))
    }
}

pub fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn u32s(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub struct Frontend {
    pub socket: UnixStream,
    pub memory: SharedMemory,
    pub features: u64,
}

pub fn send(socket: &UnixStream, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    let bytes = [u32s(&[request, flags, payload.len() as u32]), payload.to_vec()].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

/// The next message, or `None` at the end of the connection.
pub fn receive(socket: &UnixStream) -> Option<Reply> {
    let mut fds = Vec::new();
    let mut exact = |len: usize| {
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            assert!(wait_readable(socket.as_fd(), PATIENCE), "no answer from the server");
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let target = IoSliceMut::new(&mut bytes[filled..]);
            let received = recvmsg(socket, &mut [target], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = message {
                    fds.extend(more);
                }
            }
            if received.bytes == 0 {
                return None;
            }
            filled += received.bytes;
        }
        Some(bytes)
    };
    let header = exact(12)?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let payload = exact(word(8) as usize)?;
    Some(Reply { request: word(0), flags: word(4), payload, fds })
}

impl Frontend {
    /// Connects, negotiates everything offered but logging, and shares memory.
    pub fn connect(path: &Path) -> Frontend {
        Frontend::connect_with(path, SharedMemory::new(MEMORY), u64::MAX)
    }

    pub fn connect_with(path: &Path, memory: SharedMemory, wanted: u64) -> Frontend {
        let socket = UnixStream::connect(path).unwrap();
        let mut frontend = Frontend { socket, memory, features: 0 };
        frontend.tell(req::SET_OWNER, &[], &[]);
        let offered = frontend.ask(req::GET_FEATURES, &[]).u64();
        frontend.features = offered & wanted & !F_LOG_ALL | F_PROTOCOL;
        let protocol = frontend.ask(req::GET_PROTOCOL_FEATURES, &[]).u64();
        frontend.tell(req::SET_PROTOCOL_FEATURES, &u64s(&[protocol]), &[]);
        frontend.must(req::SET_FEATURES, &u64s(&[frontend.features]), &[]);
        frontend.share_memory();
        frontend
    }

    pub fn share_memory(&self) {
        let payload = [u32s(&[1, 0]), u64s(&[GUEST, self.memory.size, USER, 0])].concat();
        self.must(req::SET_MEM_TABLE, &payload, &[self.memory.file.as_fd()]);
    }

    /// Sends a message that is not answered.
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        send(&self.socket, request, 1, payload, fds);
    }

    /// Sends a message that has a reply.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Reply {
        self.ask_with(request, payload, &[])
    }

    pub fn ask_with(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Reply {
        self.tell(request, payload, fds);
        let reply = receive(&self.socket).expect("the server hung up");
        assert_eq!(reply.request, request);
        reply
    }

    /// Sends a message and returns its acknowledgement: 0 if it was obeyed.
    pub fn try_tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        send(&self.socket, request, 9, payload, fds);
        let reply = receive(&self.socket).expect("the server hung up");
        assert_eq!(reply.request, request);
        reply.u64()
    }

    pub fn must(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.try_tell(request, payload, fds), 0, "request {request} was refused");
    }

    /// Sets up and enables a queue whose available ring starts at `base`.
    pub fn start(&self, queue: &Queue, base: u16) {
        self.configure(queue, base);
        self.kick_and_enable(queue);
    }

    pub fn configure(&self, queue: &Queue, base: u16) {
        let index = queue.index;
        self.must(req::SET_VRING_NUM, &u32s(&[index, u32::from(queue.size)]), &[]);
        self.must(req::SET_VRING_BASE, &u32s(&[index, u32::from(base)]), &[]);
        self.set_addresses(queue, None);
        self.must(req::SET_VRING_CALL, &u64s(&[u64::from(index)]), &[queue.call.as_fd()]);
        self.must(req::SET_VRING_ERR, &u64s(&[u64::from(index)]), &[queue.error.as_fd()]);
    }

    pub fn kick_and_enable(&self, queue: &Queue) {
        self.must(req::SET_VRING_KICK, &u64s(&[u64::from(queue.index)]), &[queue.kick.as_fd()]);
        self.must(req::SET_VRING_ENABLE, &u32s(&[queue.index, 1]), &[]);
    }

    pub fn set_addresses(&self, queue: &Queue, log: Option<u64>) {
        let flags = u32::from(log.is_some());
        let addresses = [USER + queue.desc, USER + queue.used, USER + queue.avail, log.unwrap_or(0)];
        let payload = [u32s(&[queue.index, flags]), u64s(&addresses)].concat();
        self.must(req::SET_VRING_ADDR, &payload, &[]);
    }

    /// Stops a queue; the index at which it would go on.
    pub fn stop(&self, index: u32) -> u32 {
        let reply = self.ask(req::GET_VRING_BASE, &u32s(&[index, 0]));
        assert_eq!(reply.payload[..4], index.to_ne_bytes());
        u32::from_ne_bytes(reply.payload[4..8].try_into().unwrap())
    }

    pub fn config(&self, offset: u32, len: u32) -> Vec<u8> {
        let payload = [u32s(&[offset, len, 0]), vec![0; len as usize]].concat();
        self.ask(req::GET_CONFIG, &payload).payload.split_off(12)
    }

    /// In sectors.
    pub fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config(0, 8).try_into().unwrap())
    }

    /// True if the server ends the connection.
    pub fn is_hung_up(&self) -> bool {
        wait_readable(self.socket.as_fd(), PATIENCE) && receive(&self.socket).is_none()
    }
}
