//! Guest RAM registered with the kernel: pinned once, instead of once per send.
//!
//! Registering faults every page in, so only what is populated is worth it: the caller says which extents.
//! A registered buffer pins the page that was there when it was registered. If the VMM discards guest memory
//! afterwards (balloon, `MADV_DONTNEED`, hole punching), the kernel would go on sending the old page. So nothing is
//! registered unless the VMM allows it, and a [discard](crate::transport::Discards) ends it, until the VMM has done with them.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::IoUring;
use parking_lot::Mutex;

use super::ring::Ring;
use crate::layout::{GuestMemory, HostRun};
use crate::page::Piece;

/// Bytes in one registered buffer, at most: the kernel's own limit (`io_buffer_validate`).
pub(in crate::transport) const BUFFER_BYTES_MAX: usize = 1 << 30;

/// Buffers in one ring's table, at most (`IORING_MAX_REG_BUFFERS`).
pub(in crate::transport) const BUFFERS_MAX: usize = 1 << 14;

/// A table of registered buffers on a ring that does nothing else. The rings of the channels clone it, which costs
/// no further pin. (They cannot clone from one another: since Linux 6.17, a single-issuer ring may be read by its
/// own thread only.)
pub(in crate::transport) struct RegisteredBuffers {
    ring: IoUring,
    table: Table,
    /// Keeps guest RAM mapped as long as it is registered.
    _memory: GuestMemory,
}

impl fmt::Debug for RegisteredBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RegisteredBuffers").field(&self.table).finish()
    }
}

/// Guest RAM as the first channel registered it, for the others to take over; or why it could not. With how often guest memory
/// had been discarded by then.
pub(in crate::transport) type SharedRegistration = Mutex<Option<(u64, Result<RegisteredBuffers, String>)>>;

/// Which buffer holds an address: the buffers in ascending order, by first address and length.
#[derive(Clone, Debug)]
struct Table(Vec<(usize, usize)>);

/// One ring's view of registered memory.
#[derive(Clone, Debug)]
pub(in crate::transport) struct Registration(Table);

impl Registration {
    /// The buffer that holds all of `pieces`, if there is one.
    pub(in crate::transport) fn buffer_of(&self, pieces: &[Piece]) -> Option<u16> {
        let runs = || {
            pieces.iter().map(|piece| match piece {
                Piece::Ram(run) => Some(run),
                Piece::Staged(_) => None,
            })
        };
        let first = runs().next()??.host.addr();
        let Table(buffers) = &self.0;
        let index = buffers.partition_point(|(start, _)| *start <= first).checked_sub(1)?;
        let (start, length) = buffers[index];
        let inside = |piece: &HostRun| {
            piece.host.addr() >= start && piece.host.addr() + piece.len_bytes() <= start + length
        };
        runs().all(|run| run.is_some_and(inside)).then(|| u16::try_from(index).ok()).flatten()
    }
}

impl RegisteredBuffers {
    /// Registers `extents` of `memory`, cut into buffers.
    pub(in crate::transport) fn new(memory: &GuestMemory, extents: &[HostRun]) -> io::Result<Self> {
        let mut buffers = Vec::new();
        for extent in extents {
            for offset in (0..extent.len_bytes()).step_by(BUFFER_BYTES_MAX) {
                let length = (extent.len_bytes() - offset).min(BUFFER_BYTES_MAX);
                buffers
                    .push(libc::iovec { iov_base: extent.host.wrapping_add(offset).cast(), iov_len: length });
            }
        }
        if buffers.len() > BUFFERS_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        buffers.sort_by_key(|buffer| buffer.iov_base.addr());
        let ring = IoUring::new(1)?;
        // SAFETY: the extents are guest RAM, which by `GuestMemory::new` is mapped as long as any clone of the
        // layout lives; this value and the rings that use the table hold one.
        unsafe { ring.submitter().register_buffers(&buffers) }?;
        let table = Table(buffers.iter().map(|buffer| (buffer.iov_base.addr(), buffer.iov_len)).collect());
        Ok(Self { ring, table, _memory: memory.clone() })
    }

    /// Gives a channel's ring the same table.
    pub(super) fn clone_into(&self, ring: &Ring) -> io::Result<Registration> {
        ring.io.submitter().register_buffers_clone(self.ring.as_raw_fd())?;
        Ok(Registration(self.table.clone()))
    }

    /// Bytes that are registered.
    pub(in crate::transport) fn bytes(&self) -> u64 {
        self.table.0.iter().map(|(_, length)| *length as u64).sum()
    }
}
