//! The versions of the data connections that this side speaks.

/// The newest version, which this side offers. Version 1 made no promise, and is refused.
pub const DATA_VERSION: u16 = 2;

/// The oldest version that this side still speaks.
pub const DATA_VERSION_OLDEST: u16 = 2;
