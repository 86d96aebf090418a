//! transport

pub mod probe;
