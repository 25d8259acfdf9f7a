//! Devices that stand on another device and change one thing about it.

pub mod aligned;
pub mod fault;
pub mod zero_fill;
