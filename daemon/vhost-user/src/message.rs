//! vhost-user messages: bytes and descriptors in, typed requests out, and replies the other way. Does no I/O.
//!
//! ```text
//!   0        4        8        12
//!   | request | flags  | size   | payload (size bytes) …      + file descriptors beside it
//!              version 1 in bits 0-1, reply in bit 2, need_reply in bit 3
//! ```

use std::os::fd::OwnedFd;

use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion, VhostUserMsgValidator,
    VhostUserSingleMemoryRegion, VhostUserTransferDeviceState, VhostUserU64, VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::ByteValued;

pub const HEADER_LEN: usize = 12;
/// The longest payload accepted. The longest that exists, a memory table, needs 32 bytes a region.
pub const PAYLOAD_MAX: usize = 4096;
/// The most descriptors accepted beside one message: one for each region of a full memory table.
pub const FDS_MAX: usize = REGIONS_PER_TABLE_MAX;
/// The most regions in one SET_MEM_TABLE.
pub const REGIONS_PER_TABLE_MAX: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const NO_FD: u64 = 1 << 8;
const RING_MASK: u64 = 0xff;

/// Why bytes are not a message.
#[derive(Error, Debug, PartialEq, Eq)]
pub enum MessageError {
    #[error("version {0} of the protocol is not spoken here")]
    Version(u32),
    #[error("a reply arrived where a request was due")]
    UnexpectedReply,
    #[error("a payload of {0} bytes is longer than any message's")]
    TooLong(u32),
    #[error("request {0} has a payload of the wrong size or with invalid fields")]
    Payload(u32),
    #[error("request {request} came with {found} file descriptors instead of {wanted}")]
    Descriptors { request: u32, found: usize, wanted: usize },
}

/// The start of every message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub request: u32,
    pub flags: u32,
    pub size: u32,
}

impl Header {
    /// The header of a request, checked as far as it can be alone.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, MessageError> {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let header = Header { request: word(0), flags: word(4), size: word(8) };
        if header.flags & VERSION_MASK != VERSION {
            return Err(MessageError::Version(header.flags & VERSION_MASK));
        }
        if header.flags & REPLY != 0 {
            return Err(MessageError::UnexpectedReply);
        }
        if header.size as usize > PAYLOAD_MAX {
            return Err(MessageError::TooLong(header.size));
        }
        Ok(header)
    }

    /// True if the front end wants to be told the outcome.
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }
}

/// The bytes of a reply to `request`.
pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    encode(request, VERSION | REPLY, payload)
}

/// The bytes of a request of our own, to which no reply is wanted.
pub fn notification(request: u32) -> Vec<u8> {
    encode(request, VERSION, &[])
}

fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    for word in [request, flags, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// A ring's index and one number about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingValue {
    pub ring: u32,
    pub value: u32,
}

/// Where a ring lies, in the front end's address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingAddresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// Where writes to the used ring are logged, if they are.
    pub log: Option<u64>,
}

/// A part of guest memory and its place in the file beside the message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionSpec {
    pub guest: u64,
    pub size: u64,
    pub user: u64,
    pub file_offset: u64,
}

/// Shared memory that is not guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AreaSpec {
    pub size: u64,
    pub file_offset: u64,
}

/// The shape of an in-flight log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InflightSpec {
    pub area: AreaSpec,
    pub queues: u16,
    pub queue_size: u16,
}

/// Access to configuration space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigAccess {
    pub offset: u32,
    pub flags: u32,
    pub bytes: Vec<u8>,
}

/// A request of the front end.
#[derive(Debug)]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    SetOwner,
    ResetOwner,
    ResetDevice,
    SetMemTable(Vec<(RegionSpec, OwnedFd)>),
    GetMaxMemSlots,
    AddMemRegion(RegionSpec, OwnedFd),
    RemoveMemRegion(RegionSpec),
    SetLogBase(AreaSpec, OwnedFd),
    SetLogFd,
    GetQueueNum,
    SetRingSize(RingValue),
    SetRingAddresses(u32, RingAddresses),
    SetRingBase(RingValue),
    GetRingBase(u32),
    SetRingEnabled(RingValue),
    SetRingKick(u32, Option<OwnedFd>),
    SetRingCall(u32, Option<OwnedFd>),
    SetRingError(u32, Option<OwnedFd>),
    GetConfig(ConfigAccess),
    SetConfig(ConfigAccess),
    SetBackendChannel(OwnedFd),
    GetInflight(InflightSpec),
    SetInflight(InflightSpec, OwnedFd),
    GetStatus,
    SetStatus(u64),
    /// `load`: the front end sends us a state; otherwise it wants ours.
    SetDeviceState {
        load: bool,
        channel: OwnedFd,
    },
    CheckDeviceState,
    Unsupported(u32),
}

impl Message {
    /// What a checked header, its payload and the descriptors beside it mean.
    pub fn parse(header: Header, payload: &[u8], mut fds: Vec<OwnedFd>) -> Result<Message, MessageError> {
        use FrontendReq as Req;
        let input = Input { request: header.request, payload };
        let Ok(request) = FrontendReq::try_from(header.request) else {
            return Ok(Message::Unsupported(header.request));
        };
        if matches!(request, Req::SET_MEM_TABLE) {
            return input.memory_table(fds);
        }
        if matches!(request, Req::SET_VRING_KICK | Req::SET_VRING_CALL | Req::SET_VRING_ERR) {
            return input.ring_descriptor(request, fds);
        }
        if matches!(request, Req::REM_MEM_REG) {
            // Some front ends send a descriptor along; it is closed unused.
            fds.clear();
        }
        let wants_fd = matches!(
            request,
            Req::ADD_MEM_REG
                | Req::SET_LOG_BASE
                | Req::SET_LOG_FD
                | Req::SET_BACKEND_REQ_FD
                | Req::SET_INFLIGHT_FD
                | Req::SET_DEVICE_STATE_FD
        );
        match (wants_fd, fds.pop()) {
            (true, Some(fd)) if fds.is_empty() => input.with_descriptor(request, fd),
            (false, None) => input.without_descriptor(request),
            (wanted, last) => Err(MessageError::Descriptors {
                request: header.request,
                found: fds.len() + usize::from(last.is_some()),
                wanted: usize::from(wanted),
            }),
        }
    }
}

struct Input<'a> {
    request: u32,
    payload: &'a [u8],
}

impl Input<'_> {
    fn wrong(&self) -> MessageError {
        MessageError::Payload(self.request)
    }

    /// The whole payload as one structure.
    fn body<T: ByteValued + Default + VhostUserMsgValidator>(&self) -> Result<T, MessageError> {
        self.prefix().filter(|_| self.payload.len() == size_of::<T>()).ok_or_else(|| self.wrong())
    }

    /// The structure the payload starts with.
    fn prefix<T: ByteValued + Default + VhostUserMsgValidator>(&self) -> Option<T> {
        let bytes = self.payload.get(..size_of::<T>())?;
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(bytes);
        value.is_valid().then_some(value)
    }

    fn u64(&self) -> Result<u64, MessageError> {
        self.body::<VhostUserU64>().map(|body| body.value)
    }

    fn ring_value(&self) -> Result<RingValue, MessageError> {
        let body = self.body::<VhostUserVringState>()?;
        Ok(RingValue { ring: body.index, value: body.num })
    }

    fn region(&self) -> Result<RegionSpec, MessageError> {
        let body = self.body::<VhostUserSingleMemoryRegion>()?;
        region(&body).ok_or_else(|| self.wrong())
    }

    fn inflight(&self) -> Result<InflightSpec, MessageError> {
        let body = self.body::<VhostUserInflight>()?;
        let area = AreaSpec { size: body.mmap_size, file_offset: body.mmap_offset };
        Ok(InflightSpec { area, queues: body.num_queues, queue_size: body.queue_size })
    }

    fn config(&self) -> Result<ConfigAccess, MessageError> {
        let head = self.prefix::<VhostUserConfig>().ok_or_else(|| self.wrong())?;
        let bytes = self.payload[size_of::<VhostUserConfig>()..].to_vec();
        if bytes.len() != head.size as usize {
            return Err(self.wrong());
        }
        Ok(ConfigAccess { offset: head.offset, flags: head.flags, bytes })
    }

    fn memory_table(&self, fds: Vec<OwnedFd>) -> Result<Message, MessageError> {
        let head = self.prefix::<VhostUserMemory>().ok_or_else(|| self.wrong())?;
        let count = head.num_regions as usize;
        let regions = &self.payload[size_of::<VhostUserMemory>()..];
        if count > REGIONS_PER_TABLE_MAX || regions.len() != count * size_of::<VhostUserMemoryRegion>() {
            return Err(self.wrong());
        }
        if fds.len() != count {
            return Err(MessageError::Descriptors { request: self.request, found: fds.len(), wanted: count });
        }
        let specs = regions.chunks_exact(size_of::<VhostUserMemoryRegion>()).map(|bytes| {
            let body = Input { request: self.request, payload: bytes }.body::<VhostUserMemoryRegion>()?;
            region(&body).ok_or_else(|| self.wrong())
        });
        let specs = specs.collect::<Result<Vec<_>, _>>()?;
        Ok(Message::SetMemTable(specs.into_iter().zip(fds).collect()))
    }

    /// Kick, call and error descriptors: ring in bits 0-7, bit 8 set if there is no descriptor.
    fn ring_descriptor(&self, request: FrontendReq, mut fds: Vec<OwnedFd>) -> Result<Message, MessageError> {
        let value = self.u64()?;
        let wanted = usize::from(value & NO_FD == 0);
        if fds.len() != wanted {
            return Err(MessageError::Descriptors { request: self.request, found: fds.len(), wanted });
        }
        let ring = (value & RING_MASK) as u32;
        let fd = fds.pop();
        Ok(match request {
            FrontendReq::SET_VRING_KICK => Message::SetRingKick(ring, fd),
            FrontendReq::SET_VRING_CALL => Message::SetRingCall(ring, fd),
            _ => Message::SetRingError(ring, fd),
        })
    }

    fn with_descriptor(&self, request: FrontendReq, fd: OwnedFd) -> Result<Message, MessageError> {
        Ok(match request {
            FrontendReq::ADD_MEM_REG => Message::AddMemRegion(self.region()?, fd),
            FrontendReq::SET_LOG_BASE => {
                let body = self.body::<VhostUserLog>()?;
                Message::SetLogBase(AreaSpec { size: body.mmap_size, file_offset: body.mmap_offset }, fd)
            }
            FrontendReq::SET_LOG_FD => Message::SetLogFd,
            FrontendReq::SET_BACKEND_REQ_FD => Message::SetBackendChannel(fd),
            FrontendReq::SET_INFLIGHT_FD => Message::SetInflight(self.inflight()?, fd),
            FrontendReq::SET_DEVICE_STATE_FD => {
                let body = self.body::<VhostUserTransferDeviceState>()?;
                Message::SetDeviceState { load: body.direction == 1, channel: fd }
            }
            _ => Message::Unsupported(self.request),
        })
    }

    fn without_descriptor(&self, request: FrontendReq) -> Result<Message, MessageError> {
        use FrontendReq as Req;
        Ok(match request {
            Req::GET_FEATURES => Message::GetFeatures,
            Req::SET_FEATURES => Message::SetFeatures(self.u64()?),
            Req::GET_PROTOCOL_FEATURES => Message::GetProtocolFeatures,
            Req::SET_PROTOCOL_FEATURES => Message::SetProtocolFeatures(self.u64()?),
            Req::SET_OWNER => Message::SetOwner,
            Req::RESET_OWNER => Message::ResetOwner,
            Req::RESET_DEVICE => Message::ResetDevice,
            Req::GET_MAX_MEM_SLOTS => Message::GetMaxMemSlots,
            Req::REM_MEM_REG => Message::RemoveMemRegion(self.region()?),
            Req::GET_QUEUE_NUM => Message::GetQueueNum,
            Req::SET_VRING_NUM => Message::SetRingSize(self.ring_value()?),
            Req::SET_VRING_ADDR => {
                let body = self.body::<VhostUserVringAddr>()?;
                let addresses = RingAddresses {
                    descriptors: body.descriptor,
                    available: body.available,
                    used: body.used,
                    log: (body.flags & 1 != 0).then_some(body.log),
                };
                Message::SetRingAddresses(body.index, addresses)
            }
            Req::SET_VRING_BASE => Message::SetRingBase(self.ring_value()?),
            Req::GET_VRING_BASE => Message::GetRingBase(self.ring_value()?.ring),
            Req::SET_VRING_ENABLE => Message::SetRingEnabled(self.ring_value()?),
            Req::GET_CONFIG => Message::GetConfig(self.config()?),
            Req::SET_CONFIG => Message::SetConfig(self.config()?),
            Req::GET_INFLIGHT_FD => Message::GetInflight(self.inflight()?),
            Req::GET_STATUS => Message::GetStatus,
            Req::SET_STATUS => Message::SetStatus(self.u64()?),
            Req::CHECK_DEVICE_STATE => Message::CheckDeviceState,
            _ => Message::Unsupported(self.request),
        })
    }
}

fn region(body: &VhostUserMemoryRegion) -> Option<RegionSpec> {
    body.is_valid().then_some(RegionSpec {
        guest: body.guest_phys_addr,
        size: body.memory_size,
        user: body.user_addr,
        file_offset: body.mmap_offset,
    })
}

/// The payload of a reply that describes an in-flight log.
pub fn inflight_payload(spec: InflightSpec) -> Vec<u8> {
    let mut payload = Vec::with_capacity(size_of::<VhostUserInflight>());
    payload.extend_from_slice(&spec.area.size.to_ne_bytes());
    payload.extend_from_slice(&spec.area.file_offset.to_ne_bytes());
    payload.extend_from_slice(&spec.queues.to_ne_bytes());
    payload.extend_from_slice(&spec.queue_size.to_ne_bytes());
    payload.resize(size_of::<VhostUserInflight>(), 0);
    payload
}

/// The payload of a reply to GET_CONFIG: as it was asked, with the bytes found there, or none if they cannot be read.
pub fn config_payload(access: &ConfigAccess, bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(size_of::<VhostUserConfig>() + bytes.len());
    for word in [access.offset, bytes.len() as u32, access.flags] {
        payload.extend_from_slice(&word.to_ne_bytes());
    }
    payload.extend_from_slice(bytes);
    payload
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fds(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    fn header(request: u32, payload: &[u8]) -> Header {
        Header { request, flags: VERSION, size: payload.len() as u32 }
    }

    #[test]
    fn headers_are_checked() {
        let parse = |request: u32, flags: u32, size: u32| {
            let mut bytes = [0; HEADER_LEN];
            for (at, word) in [request, flags, size].into_iter().enumerate() {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&word.to_ne_bytes());
            }
            Header::parse(&bytes)
        };
        assert!(parse(1, 1, 0).is_ok_and(|header| !header.needs_reply()));
        assert!(parse(1, 9, 0).is_ok_and(|header| header.needs_reply()));
        assert_eq!(parse(1, 2, 0), Err(MessageError::Version(2)));
        assert_eq!(parse(1, 5, 0), Err(MessageError::UnexpectedReply));
        assert_eq!(parse(1, 1, 4097), Err(MessageError::TooLong(4097)));
    }

    #[test]
    fn a_memory_table_needs_one_descriptor_for_each_region() {
        let mut payload = 2u64.to_ne_bytes().to_vec();
        for region in [[0u64, 4096, 0x1000, 0], [4096, 4096, 0x2000, 4096]] {
            payload.extend(region.iter().flat_map(|word| word.to_ne_bytes()));
        }
        let parse = |payload: &[u8], count| Message::parse(header(5, payload), payload, fds(count));
        assert!(matches!(parse(&payload, 2), Ok(Message::SetMemTable(regions)) if regions[1].0.guest == 4096));
        assert_eq!(parse(&payload, 1).err(), Some(MessageError::Descriptors { request: 5, found: 1, wanted: 2 }));
        assert_eq!(parse(&payload[..40], 2).err(), Some(MessageError::Payload(5)));
        payload[16..24].copy_from_slice(&u64::MAX.to_ne_bytes());
        payload[8..16].copy_from_slice(&1u64.to_ne_bytes());
        assert_eq!(parse(&payload, 2).err(), Some(MessageError::Payload(5)), "an address range that wraps around");
    }

    #[test]
    fn config_payloads_echo_the_request() {
        let access = ConfigAccess { offset: 0x100, flags: 1, bytes: vec![0; 8] };
        let payload = config_payload(&access, &[7; 8]);
        let parsed = Message::parse(header(24, &payload), &payload, Vec::new());
        let expected = ConfigAccess { bytes: vec![7; 8], ..access };
        assert!(matches!(parsed, Ok(Message::GetConfig(access)) if access == expected));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(request in 0u32..64, payload in proptest::collection::vec(any::<u8>(), 0..300), count in 0usize..4) {
            let _ = Message::parse(header(request, &payload), &payload, fds(count));
        }

        #[test]
        fn ring_descriptors_follow_bit_8(ring in 0u64..256, given in any::<bool>(), flagged in any::<bool>()) {
            let payload = (ring | if flagged { NO_FD } else { 0 }).to_ne_bytes();
            let parsed = Message::parse(header(12, &payload), &payload, fds(usize::from(given)));
            match parsed {
                Ok(Message::SetRingKick(index, fd)) => {
                    prop_assert_eq!(u64::from(index), ring);
                    prop_assert!(fd.is_some() == given && given != flagged);
                }
                _ => prop_assert_eq!(given, flagged),
            }
        }
    }
}
