//! The binary `ringferry` as its user meets it.
#![expect(clippy::unwrap_used, reason = "what a test arranges must be there")]

mod arrivals;
mod bench_send;
mod bench_track;
#[path = "../../../../tests/handover/proxy.rs"]
mod control_proxy;
mod devices;
mod doctor;
mod faults;
mod frozen;
mod guest;
mod links;
mod lost_output;
mod migration;
mod monitor;
mod offload;
mod signals;
mod support;
mod undecided;
mod usage;
