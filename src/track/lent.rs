//! Who has the rings of a VM while they are lent.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::lent_page::LentPage;

/// Who has the rings.
#[derive(Debug)]
pub(super) enum Lent {
    /// A process that follows them; a full ring waits for it.
    Followed(Arc<LentPage>),
    /// A process that answers no more and is not gone either: it may wake up and take entries once more, and until this
    /// connection to it ends nobody can say that a harvest is whole. A full ring is recycled here meanwhile.
    Frozen(OwnedFd),
}

impl Lent {
    /// Whether the process has ended. The kernel closes a process's sockets when none of its threads runs any more.
    pub(super) fn has_gone(&self) -> bool {
        let Self::Frozen(connection) = self else { return false };
        let mut polled = [PollFd::new(connection, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&now)).is_ok()
            && polled[0].revents().intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR)
    }
}
