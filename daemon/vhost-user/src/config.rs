//! The device's features and configuration space (virtio 1.3, 5.2.3 and 5.2.4).

use blockdev::Volume;
use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use virtio_bindings::{virtio_blk as blk, virtio_config, virtio_ring};

use crate::chain::Limits;

/// The most data segments of one request: with header and status a chain of 128, the size of QEMU's default ring.
pub const SEGMENTS_MAX: u32 = 126;
/// The longest data segment, in bytes; a request of [`SEGMENTS_MAX`] such segments still fits into one aligned buffer.
pub const SEGMENT_LEN_MAX: u32 = 512 << 10;
/// The most ranges of one discard or write-zeroes request.
pub const DISCARD_SEGMENTS_MAX: u32 = 32;

/// Where older Cloud Hypervisor versions think the configuration space starts.
const LEGACY_CONFIG_START: u32 = 0x100;
/// Offset of the one byte that a driver may write: 1 write back, 0 write through.
const WRITE_CACHE_OFFSET: usize = 32;
const CONFIG_LEN: usize = 60;
const SECTOR: u64 = 512;
const RANGE_SECTORS_MAX: u32 = 1 << 25;
/// Where zeroes must be written one by one, requests are kept short.
const SLOW_ZEROES_SECTORS_MAX: u32 = 1 << 15;

pub const FEATURE_EVENT_INDEX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
pub const FEATURE_INDIRECT: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
pub const FEATURE_FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
pub const FEATURE_WRITE_CACHE: u64 = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
pub const FEATURE_LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
pub const FEATURE_PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The virtio features offered for `volume`.
pub fn features(volume: &Volume, read_only: bool) -> u64 {
    let mut features = FEATURE_EVENT_INDEX | FEATURE_INDIRECT | FEATURE_LOG_ALL | FEATURE_PROTOCOL;
    let always = [
        virtio_config::VIRTIO_F_VERSION_1,
        blk::VIRTIO_BLK_F_SIZE_MAX,
        blk::VIRTIO_BLK_F_SEG_MAX,
        blk::VIRTIO_BLK_F_BLK_SIZE,
        blk::VIRTIO_BLK_F_TOPOLOGY,
        blk::VIRTIO_BLK_F_MQ,
    ];
    let writable = [blk::VIRTIO_BLK_F_FLUSH, blk::VIRTIO_BLK_F_CONFIG_WCE, blk::VIRTIO_BLK_F_WRITE_ZEROES];
    features |= always.iter().fold(0, |bits, bit| bits | 1 << bit);
    if read_only {
        return features | 1 << blk::VIRTIO_BLK_F_RO;
    }
    features |= writable.iter().fold(0, |bits, bit| bits | 1 << bit);
    if volume.capabilities().discard {
        features |= 1 << blk::VIRTIO_BLK_F_DISCARD;
    }
    features
}

/// The vhost-user protocol features offered.
pub fn protocol_features() -> u64 {
    (Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::STATUS
        | Protocol::DEVICE_STATE)
        .bits()
}

/// What discards and write-zeroes are held to.
pub fn limits(volume: &Volume) -> Limits {
    let fast = volume.capabilities().fast_zero;
    let zeroes_sectors_max = if fast { RANGE_SECTORS_MAX } else { SLOW_ZEROES_SECTORS_MAX };
    Limits { range_sectors_max: RANGE_SECTORS_MAX, zeroes_sectors_max }
}

/// The configuration space as it is now.
pub fn space(volume: &Volume, queues: u16, write_back: bool) -> [u8; CONFIG_LEN] {
    let geometry = volume.geometry();
    let block_size = volume.block_size();
    let limits = limits(volume);
    let physical = geometry.preferred_size.clamp(block_size, 64 << 10);
    let sectors = |bytes: u32| bytes / SECTOR as u32;
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(volume.size() / SECTOR).to_le_bytes());
    put(8, &SEGMENT_LEN_MAX.to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &block_size.to_le_bytes());
    put(24, &[(physical / block_size).ilog2() as u8]);
    put(26, &((physical / block_size) as u16).to_le_bytes());
    put(WRITE_CACHE_OFFSET, &[u8::from(write_back)]);
    put(34, &queues.to_le_bytes());
    put(36, &limits.range_sectors_max.to_le_bytes());
    put(40, &DISCARD_SEGMENTS_MAX.to_le_bytes());
    put(44, &sectors(geometry.discard_granularity.max(block_size)).to_le_bytes());
    put(48, &limits.zeroes_sectors_max.to_le_bytes());
    put(52, &DISCARD_SEGMENTS_MAX.to_le_bytes());
    put(56, &[1]);
    space
}

/// `len` bytes of the configuration space from `offset`, counted from 0 or from 0x100; what lies beyond is zero.
pub fn read(space: &[u8], offset: u32, len: usize) -> Option<Vec<u8>> {
    let start = if offset >= LEGACY_CONFIG_START { offset - LEGACY_CONFIG_START } else { offset } as usize;
    let end = start.checked_add(len)?;
    let mut bytes: Vec<u8> = space.get(start..end.min(space.len())).unwrap_or_default().to_vec();
    bytes.resize(len, 0);
    Some(bytes)
}

/// What a write to configuration space sets the write cache to; `None` if it would change anything else than that.
pub fn written_cache(space: &[u8], offset: u32, bytes: &[u8], migrating: bool) -> Option<Option<bool>> {
    let start = if offset >= LEGACY_CONFIG_START { offset - LEGACY_CONFIG_START } else { offset } as usize;
    let end = start.checked_add(bytes.len())?;
    let mut cache = None;
    for (at, byte) in (start..end).zip(bytes) {
        if at == WRITE_CACHE_OFFSET {
            cache = Some(*byte != 0);
        } else if !migrating && space.get(at) != Some(byte) {
            return None;
        }
    }
    Some(cache)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_at_both_bases_agree() {
        let space: [u8; CONFIG_LEN] = std::array::from_fn(|at| at as u8 + 1);
        assert_eq!(read(&space, 0, 8), read(&space, 0x100, 8));
        assert_eq!(read(&space, 56, 8), Some(vec![57, 58, 59, 60, 0, 0, 0, 0]));
        assert_eq!(read(&space, 0x300, 2), Some(vec![0, 0]));
    }

    #[test]
    fn only_the_write_cache_can_be_written() {
        let space = [5; CONFIG_LEN];
        assert_eq!(written_cache(&space, 32, &[0], false), Some(Some(false)));
        assert_eq!(written_cache(&space, 0x120, &[1], false), Some(Some(true)));
        assert_eq!(written_cache(&space, 31, &[5, 0], false), Some(Some(false)));
        assert_eq!(written_cache(&space, 31, &[4, 0], false), None);
        assert_eq!(written_cache(&space, 31, &[4, 0], true), Some(Some(false)));
        assert_eq!(written_cache(&space, 59, &[5, 5], false), None);
    }
}
