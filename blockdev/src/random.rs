//! The only place that makes random names; what keys are made of comes from `volume::crypto::system_random`.

#![allow(clippy::disallowed_methods)]

use uuid::Uuid;

/// A name that nobody else has.
pub fn uuid() -> Uuid {
    Uuid::new_v4()
}
