//! A minimal real VMM and its guest.

mod skip;

pub use skip::skip;
