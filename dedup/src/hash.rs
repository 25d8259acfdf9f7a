//! What a block is known by: a keyed hash that only one domain of one pool computes.
//!
//! ```text
//!   pool key (32) ─┐
//!   domain id (16) ┴▶ BLAKE3 derive_key("novastor v1 block hash") = domain key (32)
//!   domain key, block (4096) ─▶ BLAKE3 keyed_hash, its first 16 bytes = BlockHash
//! ```
//!
//! - Without the pool's key nobody can tell from a hash whether a known block is stored. With it, equal blocks of two domains still have
//!   unrelated hashes, so no index and no header lets one domain probe for another's content.
//! - 128 bits suffice against accidents: 2^38 blocks (1 PiB) collide with a probability of 2^-53. Whoever knows the pool's key can search for
//!   collisions in 2^64 steps; those who do not trust the holders of the key verify hits byte by byte (see [`crate::pack`]).

use crate::{BLOCK_LEN, Block};
use std::fmt;

/// Context strings of BLAKE3's key derivation. Part of the format: never changed.
const HASH_CONTEXT: &str = "novastor v1 block hash";
const DOMAIN_CONTEXT: &str = "novastor v1 dedup domain";

static ZEROES: Block = [0; BLOCK_LEN];

/// The hash of a block within its domain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 16]);

impl BlockHash {
    /// Bytes 8 to 16 as a number: uniform, for hash tables.
    pub(crate) fn word(&self) -> u64 {
        (u128::from_le_bytes(self.0) >> 64) as u64
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Whose blocks are deduplicated against each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DomainKind {
    /// One volume with its snapshots.
    Volume,
    /// All volumes of a tenant within a pool.
    Tenant,
    /// One immutable image that many may refer to.
    Library,
}

/// The id of a dedup domain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Domain(pub [u8; 16]);

impl Domain {
    /// The domain of the volume, tenant or library image with this UUID: the first 16 bytes of
    /// BLAKE3 derive_key("novastor v1 dedup domain", kind ‖ UUID), where kind is one byte: 0 volume, 1 tenant, 2 library.
    #[must_use]
    pub fn new(kind: DomainKind, uuid: &[u8; 16]) -> Self {
        let kind = match kind {
            DomainKind::Volume => 0,
            DomainKind::Tenant => 1,
            DomainKind::Library => 2,
        };
        let mut material = [kind; 17];
        material[1..].copy_from_slice(uuid);
        Self(first_half(&blake3::derive_key(DOMAIN_CONTEXT, &material)))
    }
}

/// Hashes the blocks of one domain.
#[derive(Clone)]
pub struct Hasher {
    key: [u8; 32],
}

impl Hasher {
    #[must_use]
    pub fn new(pool_key: &[u8; 32], domain: Domain) -> Self {
        Self { key: domain_key(HASH_CONTEXT, pool_key, domain) }
    }

    #[must_use]
    pub fn hash(&self, block: &Block) -> BlockHash {
        BlockHash(first_half(blake3::keyed_hash(&self.key, block).as_bytes()))
    }
}

/// BLAKE3 derive_key(context, key ‖ domain id).
pub(crate) fn domain_key(context: &str, key: &[u8; 32], domain: Domain) -> [u8; 32] {
    let mut material = [0; 48];
    material[..32].copy_from_slice(key);
    material[32..].copy_from_slice(&domain.0);
    blake3::derive_key(context, &material)
}

/// Whether every byte is zero. Compared as memory, which stops at the first difference.
#[must_use]
pub fn is_zero(block: &Block) -> bool {
    *block == ZEROES
}

pub(crate) fn first_half(hash: &[u8; 32]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&hash[..16]);
    half
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = *b"0123456789abcdef";

    /// Built from the primitives as the module's head says, byte by byte.
    #[test]
    fn a_hash_is_what_is_documented() {
        let pool_key = [7; 32];
        let domain = Domain::new(DomainKind::Tenant, &UUID);
        let mut material = vec![1];
        material.extend_from_slice(&UUID);
        assert_eq!(domain.0, blake3::derive_key("novastor v1 dedup domain", &material)[..16]);

        let mut material = pool_key.to_vec();
        material.extend_from_slice(&domain.0);
        let key = blake3::derive_key("novastor v1 block hash", &material);
        let block = std::array::from_fn(|index| index as u8);
        assert_eq!(Hasher::new(&pool_key, domain).hash(&block).0, blake3::keyed_hash(&key, &block).as_bytes()[..16]);
    }

    #[test]
    fn pools_and_domains_hash_differently() {
        let block = [1; BLOCK_LEN];
        let domains = [DomainKind::Volume, DomainKind::Tenant, DomainKind::Library].map(|kind| Domain::new(kind, &UUID));
        let other = Domain::new(DomainKind::Volume, &[0; 16]);
        let mut hashes = Vec::new();
        for pool_key in [[1; 32], [2; 32]] {
            hashes.extend(domains.iter().chain([&other]).map(|domain| Hasher::new(&pool_key, *domain).hash(&block)));
        }
        hashes.sort();
        hashes.dedup();
        assert_eq!(hashes.len(), 8);
    }

    #[test]
    fn a_single_bit_anywhere_is_not_zero() {
        assert!(is_zero(&[0; BLOCK_LEN]));
        for index in 0..BLOCK_LEN {
            let mut block = [0; BLOCK_LEN];
            block[index] = 1 << (index % 8);
            assert!(!is_zero(&block), "byte {index}");
        }
    }
}
