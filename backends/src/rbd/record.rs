//! What a pool keeps with an image to make it a volume.
//!
//! Images are the catalogue: each image of the Ceph pool is a volume of the same name, whoever made it. Under [`RECORD_KEY`] the
//! image's own metadata holds what Ceph has no place for; an image without it has the defaults. A volume whose name differs from
//! its image's (an adopted one) has an entry in the Ceph pool's metadata that leads to the image.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char};
use std::io;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::cluster::IoContext;
use super::image::Image;
use super::text_of;
use crate::pool::{Layout, SnapshotRecord, VolumeRecord};

const RECORD_KEY: &str = "novastor.volume";
const ALIAS_PREFIX: &str = "novastor.alias/";

#[derive(Serialize, Deserialize, Clone, Debug)]
pub(super) struct Record {
    pub uuid: Uuid,
    pub block_size: u32,
    /// Made here, so that deleting the volume deletes the image.
    #[serde(default)]
    pub created: bool,
    /// Adopted once and given up again: no volume until it is adopted anew.
    #[serde(default)]
    pub forgotten: bool,
    /// The volume's name where it is not the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
}

impl Record {
    pub(super) fn new(block_size: u32) -> Record {
        Record {
            uuid: blockdev::random::uuid(),
            block_size,
            created: true,
            forgotten: false,
            name: None,
            policy: None,
            tenant: None,
            origin: None,
        }
    }

    /// Of an image that somebody else made; its UUID follows from the cluster, the pool and the image.
    fn of_foreign(image: &Image) -> io::Result<Record> {
        let context = image.context();
        let identity = format!("{}/{}/{}", context.cluster.fsid(), context.pool_id(), image.id()?);
        let bytes = hash128(identity.as_bytes()).to_be_bytes();
        let uuid = uuid::Builder::from_custom_bytes(bytes).into_uuid();
        Ok(Record { uuid, created: false, ..Record::new(512) })
    }

    pub(super) fn read(image: &Image) -> io::Result<Record> {
        match image.metadata(RECORD_KEY)? {
            None => Record::of_foreign(image),
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("metadata {RECORD_KEY}: {error}"))),
        }
    }

    pub(super) fn write(&self, image: &Image) -> io::Result<()> {
        image.set_metadata(RECORD_KEY, &serde_json::to_string(self)?)
    }

    /// The volume that an open image is.
    pub(super) fn describe(&self, volume: &str, image_name: &str, image: &Image) -> io::Result<VolumeRecord> {
        let snapshots = image.snapshots()?.into_iter();
        let snapshots = snapshots
            .map(|snapshot| (snapshot.name, SnapshotRecord { created: snapshot.created.as_secs(), size: snapshot.size }));
        Ok(VolumeRecord {
            name: volume.to_owned(),
            uuid: self.uuid,
            size: image.size()?,
            block_size: self.block_size,
            layout: Layout::Raw,
            policy: self.policy.clone(),
            tenant: self.tenant.clone(),
            object: (!self.created).then(|| image_name.to_owned()),
            object_kind: None,
            origin: self.origin.clone(),
            wrapped_key: None,
            group: None,
            encrypted: false,
            snapshots: snapshots.collect::<BTreeMap<_, _>>(),
        })
    }
}

/// FNV-1a. It identifies, and protects nothing.
fn hash128(bytes: &[u8]) -> u128 {
    let start = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    bytes.iter().fold(start, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b))
}

fn alias_key(context: &IoContext, volume: &str) -> io::Result<CString> {
    Ok(CString::new(format!("{ALIAS_PREFIX}{}/{volume}", context.location()))?)
}

/// The image behind a volume whose name differs from its image's.
pub(super) fn alias(context: &IoContext, volume: &str) -> io::Result<Option<String>> {
    let Some(get) = context.library().rbd_pool_metadata_get else { return Ok(None) };
    let key = alias_key(context, volume)?;
    let mut buffer: Vec<c_char> = vec![0; 4096];
    let mut len = buffer.len();
    // SAFETY: the context is open, the key lives through the call, and the buffer is writable for the length given.
    match context.call(|_, raw| unsafe { get(raw, key.as_ptr(), buffer.as_mut_ptr(), &mut len) }) {
        Ok(_) => Ok(Some(text_of(&buffer)).filter(|image| !image.is_empty())),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn set_alias(context: &IoContext, volume: &str, image: &str) -> io::Result<()> {
    let Some(set) = context.library().rbd_pool_metadata_set else {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    };
    let (key, value) = (alias_key(context, volume)?, CString::new(image)?);
    // SAFETY: the context is open, and both strings live through the call.
    context.call(|_, raw| unsafe { set(raw, key.as_ptr(), value.as_ptr()) }).map(drop)
}

pub(super) fn remove_alias(context: &IoContext, volume: &str) -> io::Result<()> {
    let Some(remove) = context.library().rbd_pool_metadata_remove else { return Ok(()) };
    let key = alias_key(context, volume)?;
    // SAFETY: the context is open, and the key lives through the call.
    match context.call(|_, raw| unsafe { remove(raw, key.as_ptr()) }) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

/// All volumes whose names differ from their images': image by volume.
pub(super) fn aliases(context: &IoContext) -> io::Result<HashMap<String, String>> {
    let mut found = HashMap::new();
    let Some(list) = context.library().rbd_pool_metadata_list else { return Ok(found) };
    let prefix = format!("{ALIAS_PREFIX}{}/", context.location());
    let start = CString::new(prefix.as_str())?;
    let (mut keys, mut values): (Vec<c_char>, Vec<c_char>) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        let (mut keys_len, mut values_len) = (keys.len(), values.len());
        // SAFETY: the context is open, the string lives through the call, and both buffers are writable for the lengths given.
        let listed = context.call(|_, raw| unsafe {
            list(raw, start.as_ptr(), 0, keys.as_mut_ptr(), &mut keys_len, values.as_mut_ptr(), &mut values_len)
        });
        match listed {
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) && (keys_len > keys.len() || values_len > values.len()) => {
                keys = vec![0; keys_len];
                values = vec![0; values_len];
                continue;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            other => other?,
        };
        let entries = strings(&keys[..keys_len]).into_iter().zip(strings(&values[..values_len]));
        found.extend(entries.filter_map(|(key, image)| Some((key.strip_prefix(&prefix)?.to_owned(), image))));
        return Ok(found);
    }
}

/// The strings of a buffer, each ended by a zero byte.
fn strings(buffer: &[c_char]) -> Vec<String> {
    let mut parts: Vec<String> = buffer.split(|byte| *byte == 0).map(text_of).collect();
    parts.pop();
    parts
}
