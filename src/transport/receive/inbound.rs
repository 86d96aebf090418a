//! One migration as the receiving side's threads share it.

use super::arrivals::Arrivals;
use super::connections::Connections;
use super::state::StateStream;

/// Where what arrives goes, and the connections that bring it.
pub(super) struct Inbound {
    pub arrivals: Arrivals,
    pub state: StateStream,
    pub connections: Connections,
}
