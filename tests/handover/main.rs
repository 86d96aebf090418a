//! The handing over under faults: whatever is cut, frozen, delayed or malformed, and whenever, never do both sides run,
//! and never is the VM lost.
#![cfg(feature = "migrate")]
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod agreeing;
mod called_off;
mod cuts;
mod discards;
mod hostile;
mod order;
mod proxy;
mod recorded;
mod standstill;
mod state;
mod strangers;
mod verifying;
mod world;
