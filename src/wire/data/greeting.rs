//! The first message each way: who wants in, and what the destination says to that.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::{DataError, check_flags, check_magic, check_tail, tail_of};
use super::versions::{DATA_VERSION, DATA_VERSION_OLDEST};

const HELLO_MAGIC: u32 = u32::from_le_bytes(*b"RFdh");
const WELCOME_MAGIC: u32 = u32::from_le_bytes(*b"RFdw");

/// The flags of a greeting that must be understood. This version knows none.
const HELLO_REQUIRED_HALF: u32 = 0xffff_0000;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Role {
    /// Rounds of pages and device state.
    Bulk = 0,
    /// Single pages that somebody waits for.
    Urgent = 1,
}

/// The name of a session that may be resumed; zeros if there is none.
pub type Session = [u8; 16];

/// How every greeting of every version from 2 on begins. 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HelloHead {
    magic: U32,
    /// The newest version that the source speaks.
    version: U16,
    /// Of the whole greeting.
    bytes: U16,
}

impl HelloHead {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    /// Checks how a greeting begins; the length of all of it, between [`DataHello::BYTES`] and
    /// [`DataHello::BYTES_MAX`].
    ///
    /// # Errors
    ///
    /// [`DataError`]: magic, a version that is too old to know lengths, or an impossible length.
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<usize, DataError> {
        let head: Self = zerocopy::transmute!(*bytes);
        check_magic("a greeting", HELLO_MAGIC, head.magic)?;
        let (newest, length) = (head.version.get(), usize::from(head.bytes.get()));
        if newest < DATA_VERSION_OLDEST {
            return Err(DataError::Version { oldest: newest, newest });
        }
        let possible = (DataHello::BYTES..=DataHello::BYTES_MAX).contains(&length);
        if possible { Ok(length) } else { Err(DataError::Length { message: "a greeting", found: length }) }
    }
}

/// The first message on a data connection, from the source. 64 bytes in this version; later ones may append to it
/// ahead of the checksum.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataHello {
    head: HelloHead,
    /// The oldest version that the source speaks.
    oldest_version: U16,
    channel: U16,
    connection: U32,
    token: [u8; 16],
    session: Session,
    flags: U32,
    role: u8,
    reserved: [u8; 7],
    checksum: U32,
}

impl DataHello {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    /// Bytes of a greeting of any version.
    pub const BYTES_MAX: usize = 256;

    /// The greeting of connection number `connection`, which serves channel `channel` of the migration that
    /// `token` names. A channel that reconnects comes with a new connection number.
    pub fn new(token: [u8; 16], channel: u16, connection: u32, role: Role) -> Self {
        let mut hello = Self {
            head: HelloHead {
                magic: HELLO_MAGIC.into(),
                version: DATA_VERSION.into(),
                bytes: u16::try_from(Self::BYTES).unwrap_or(u16::MAX).into(),
            },
            oldest_version: DATA_VERSION_OLDEST.into(),
            channel: channel.into(),
            connection: connection.into(),
            token,
            session: Session::default(),
            flags: U32::ZERO,
            role: role as u8,
            reserved: [0; 7],
            checksum: U32::ZERO,
        };
        hello.checksum = tail_of(hello.as_bytes());
        hello
    }

    /// Reads and checks a whole greeting; whether the token is the right one is the caller's business. What a later
    /// version has appended is covered by the checksum and otherwise ignored.
    ///
    /// # Errors
    ///
    /// [`DataError`]: magic, no version in common, checksum, a flag that must be understood, or an unknown role.
    pub fn read(bytes: &[u8]) -> Result<Self, DataError> {
        let length = || DataError::Length { message: "a greeting", found: bytes.len() };
        let head = bytes.first_chunk().ok_or_else(length)?;
        if HelloHead::read(head)? != bytes.len() {
            return Err(length());
        }
        let (hello, _) = Self::read_from_prefix(bytes).map_err(|_| length())?;
        check_tail("a greeting", bytes)?;
        let (oldest, newest) = (hello.oldest_version.get(), hello.head.version.get());
        if oldest > DATA_VERSION || newest < DATA_VERSION_OLDEST {
            return Err(DataError::Version { oldest, newest });
        }
        check_flags("a greeting", hello.flags.get(), HELLO_REQUIRED_HALF, 0)?;
        if hello.role > Role::Urgent as u8 {
            return Err(DataError::UnknownKind { what: "a connection", found: hello.role.into() });
        }
        Ok(hello)
    }

    /// The token of the migration.
    pub fn token(&self) -> [u8; 16] {
        self.token
    }

    /// The channel that the connection serves.
    pub fn channel(&self) -> u16 {
        self.channel.get()
    }

    /// The number of the connection.
    pub fn connection(&self) -> u32 {
        self.connection.get()
    }

    /// What the connection is for.
    pub fn role(&self) -> Role {
        if self.role == Role::Urgent as u8 { Role::Urgent } else { Role::Bulk }
    }

    /// The session that the source wants to resume.
    pub fn session(&self) -> Session {
        self.session
    }
}

/// What the destination says to a greeting.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u16)]
#[non_exhaustive]
pub enum Verdict {
    /// Frames may follow.
    #[error("welcome")]
    Welcome = 0,
    /// The token names another migration.
    #[error("the destination serves another migration: the token is wrong")]
    WrongToken = 1,
    /// The destination speaks another version.
    #[error("the destination speaks another version of the data protocol")]
    WrongVersion = 2,
    /// A connection number that was used before, or a migration that takes no more connections.
    #[error("the destination takes no further connection of this migration")]
    NotExpected = 3,
    /// The destination does not know what the connection is for.
    #[error("the destination does not know this role of a connection")]
    UnknownRole = 4,
    /// The greeting demands something that the destination does not know.
    #[error("the destination does not understand what the greeting requires")]
    UnknownRequirement = 5,
    /// The migration has as many connections as it may have at a time: a later attempt may succeed.
    #[error("the destination has as many connections of this migration as it takes")]
    Busy = 6,
}

impl Verdict {
    const ALL: [Self; 7] = [
        Self::Welcome,
        Self::WrongToken,
        Self::WrongVersion,
        Self::NotExpected,
        Self::UnknownRole,
        Self::UnknownRequirement,
        Self::Busy,
    ];

    /// What is to be said about a greeting that could not be read so; `None` if its sender is a stranger.
    pub fn about(error: &DataError) -> Option<Answer> {
        match *error {
            DataError::Version { newest, .. } => Some((Self::WrongVersion, newest.into())),
            DataError::UnknownRequirement { bits, .. } => Some((Self::UnknownRequirement, bits)),
            DataError::UnknownKind { found, .. } => Some((Self::UnknownRole, found)),
            _ => None,
        }
    }
}

/// A verdict, and what it is about: the flags, the role or the version that it names, else 0.
pub type Answer = (Verdict, u32);

/// The destination's answer to a [`DataHello`]. 16 bytes; frames follow if it says [`Verdict::Welcome`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataWelcome {
    magic: U32,
    /// The version that both sides speak from here on; in a refusal, the newest that the destination speaks.
    version: U16,
    verdict: U16,
    detail: U32,
    checksum: U32,
}

impl DataWelcome {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<Self>();

    /// The answer that says `verdict`.
    pub fn new((verdict, detail): Answer) -> Self {
        let mut welcome = Self {
            magic: WELCOME_MAGIC.into(),
            version: DATA_VERSION.into(),
            verdict: (verdict as u16).into(),
            detail: detail.into(),
            checksum: U32::ZERO,
        };
        welcome.checksum = tail_of(welcome.as_bytes());
        welcome
    }

    /// Reads and checks an answer.
    ///
    /// # Errors
    ///
    /// [`DataError`]: magic, checksum, an unknown verdict, or a welcome to a version that was not offered. A refusal
    /// of another version is read as such, for its verdict says so.
    pub fn read(bytes: &[u8; Self::BYTES]) -> Result<Answer, DataError> {
        let welcome: Self = zerocopy::transmute!(*bytes);
        check_magic("an answer to a greeting", WELCOME_MAGIC, welcome.magic)?;
        check_tail("an answer to a greeting", bytes)?;
        let (version, found) = (welcome.version.get(), welcome.verdict.get());
        let verdict = Verdict::ALL.into_iter().find(|verdict| *verdict as u16 == found);
        match verdict {
            None => Err(DataError::UnknownKind { what: "a verdict", found: found.into() }),
            Some(Verdict::Welcome) if !(DATA_VERSION_OLDEST..=DATA_VERSION).contains(&version) => {
                Err(DataError::Version { oldest: version, newest: version })
            }
            Some(verdict) => Ok((verdict, welcome.detail.get())),
        }
    }
}
