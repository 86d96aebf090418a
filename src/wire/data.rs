//! What travels on a data connection, version 2.
//!
//! The source opens it with a [`DataHello`] that proves by the migration's token that it belongs here, and the
//! destination answers with a [`DataWelcome`]. Then the source sends frames: a [`FrameHeader`], its list of
//! [`WireRun`]s, an extension that only later versions fill, and the payload. The destination answers each frame,
//! once all of it is in place, with an [`Acknowledgement`].
//!
//! All integers are little-endian. Headers, run lists and extensions carry a CRC32C, and so does device state; page
//! contents cannot, because the guest may write a page while the kernel reads it. What is checked here can be checked
//! without the guest's layout; `transport::receive` checks the rest before a byte lands.
//!
//! **How it grows.** A greeting names the versions that its side speaks, and the answer picks one. Flags have two
//! halves: a bit of the upper half that the receiver does not know is refused by name, a bit of the lower half is
//! ignored. A frame of an unknown kind is skipped unless [`flags::KIND_REQUIRED`] is set. New content of pages is a
//! new [`RunKind`], new content beside them goes into the extension. `tests/wire/v2` holds a recorded stream that
//! every later version must still understand.

mod acknowledgement;
mod error;
mod frame;
mod greeting;
mod kind;
mod runs;
mod versions;

pub use self::acknowledgement::Acknowledgement;
pub use self::error::DataError;
pub use self::frame::{Frame, FrameHeader, flags, payload_checksum, read_runs, write_frame};
pub use self::greeting::{Answer, DataHello, DataWelcome, HelloHead, Role, Session, Verdict};
pub use self::kind::FrameKind;
pub use self::runs::{FrameRun, RunKind, WireRun};
pub use self::versions::{DATA_VERSION, DATA_VERSION_OLDEST};

#[cfg(test)]
mod tests;
