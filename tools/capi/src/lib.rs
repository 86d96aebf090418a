//! Ringferry's tracking layer and VMM side of offload for VMMs in C: what `include/ringferry.h` declares.
//!
//! The header is generated from the comments and signatures of this crate, so that these speak to a C programmer. A
//! function does three things: it checks its pointers (`handle`), calls the Rust layer, and turns the answer into a
//! [`Status`](status::Status) and a text (`status`). No panic leaves it.

pub mod arrival;
pub mod callbacks;
pub mod cancel;
pub mod figures;
mod handle;
pub mod lent;
pub mod offload;
pub mod session;
pub mod set;
mod slots;
pub mod source;
pub mod state_out;
pub mod status;
pub mod tracker;
pub mod vcpu;
pub mod version;
