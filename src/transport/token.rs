//! The name of a migration on its data connections.

use std::fmt;

/// What every data connection of a migration shows at its door: 128 random bits that the source chose and
/// said on the control connection. It keeps other migrations and strays apart; it is no protection against
/// somebody who can read the control connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationToken(pub [u8; 16]);

impl fmt::Debug for MigrationToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whole tokens do not belong into logs.
        write!(f, "MigrationToken({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}
