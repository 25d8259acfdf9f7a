//! The spine of novastor: what a block device is, how a request travels, and the thread that carries it.
//!
//! ```text
//!  front end (virtqueue, NBD connection)          one Reactor per data-plane thread, one io_uring each
//!      │ Request (owns its memory)   ▲ Completion
//!      ▼                             │ CompletionQueue
//!  VolumeQueue   bounds · read-only · range lock · flush gate · FUA · statistics
//!      ▼                             ▲
//!  IoQueue       layers: fault injection, alignment …
//!      ▼                             ▲
//!  IoQueue       a driver: file, RBD, memory, null
//! ```
//!
//! Invariants:
//! - A [`Request`] is completed exactly once; dropping one uncompleted panics in debug builds and fails it with EIO otherwise.
//! - An in-flight request owns the memory it reads into or writes from.
//! - A [`Reactor`], its queues and their requests never leave their thread; other threads reach them by [`ReactorHandle`].
//! - Nothing here knows of protocols, backends or configuration.

pub mod buffer;
pub mod client;
pub mod clock;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod device;
pub mod errno;
pub mod layers;
pub mod memory;
pub mod memory_disk;
pub mod null_disk;
pub mod offload;
pub mod random;
pub mod range_lock;
pub mod reactor;
pub mod request;
pub mod stats;
pub mod volume;

pub use buffer::{Buffer, BufferPool};
pub use device::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue};
pub use errno::Errno;
pub use memory::Memory;
pub use reactor::{
    DataPlane, DataPlaneOptions, Handler, HandlerId, PINNED_AREA_MAX, PinId, PinOwner, Place, Reactor, ReactorHandle,
};
pub use request::{Completer, Completion, CompletionQueue, Extent, ExtentKind, Op, Payload, Request};
pub use volume::{Volume, VolumeOptions, VolumeQueue, WriteHold};
