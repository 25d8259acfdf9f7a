//! Devices that stand on another device and change one thing about it.

pub mod aligned;
#[cfg(feature = "encryption")]
pub mod encrypted;
pub mod fault;
#[cfg(feature = "encryption")]
pub mod xts;
pub mod zero_fill;
