//! A ring that two processes know: its VMM's, which lends it, and the one that follows it for a while.
//!
//! Only one of them takes entries at a time. The borrower publishes how far it has come each time that it has taken some,
//! and before it asks for a reset. So the VMM finds its place again when the borrower has died at any moment: from the
//! published position on, what is flagged was taken and not published, and nobody has had it reset.

use std::os::fd::AsRawFd;

use super::{DirtyRing, EMPTY, RESET, RingMemory};
use crate::kvm::{KvmError, RingSize, sys};

/// Hears of a position.
pub(super) type Publish = Box<dyn Fn(u32) + Send>;

impl DirtyRing {
    /// Maps the ring of a vCPU of another process, which has taken it up to `position`. `publish` hears how far it is taken.
    /// Whether all vCPUs are of one VM, that process knows.
    pub(crate) fn map_borrowed(
        vcpu: &impl AsRawFd,
        size: RingSize,
        position: u32,
        publish: impl Fn(u32) + Send + 'static,
    ) -> Result<Self, KvmError> {
        let fd = vcpu.as_raw_fd();
        // The VMM's own, where both ends are one process: in tests.
        if !sys::is_of_another_process(fd) && !sys::is_vcpu(fd) {
            return Err(KvmError::NotVcpu);
        }
        let memory = RingMemory::map(vcpu, size).map_err(KvmError::Map)?;
        Ok(Self::borrow(Self::new(memory, position), publish))
    }

    /// The same ring, followed in the borrower's way.
    pub(crate) fn borrow(mut self, publish: impl Fn(u32) + Send + 'static) -> Self {
        publish(self.fetch);
        self.published = Some(Box::new(publish));
        self
    }

    /// How far it is taken.
    pub(crate) fn position(&self) -> u32 {
        self.fetch
    }

    /// The borrower has taken it up to `published`, and perhaps further: what follows and is flagged, it has taken, too.
    pub(crate) fn follow_borrower(&mut self, published: u32) {
        self.fetch = published;
        for _ in 0..self.size().entries() {
            if self.flags(self.fetch) != RESET {
                break;
            }
            // Whether KVM frees entries without one, the borrower may have been the first to ask.
            self.memory.entry(self.fetch).give_name();
            self.fetch = self.fetch.wrapping_add(1);
        }
        (self.scanned, self.reported) = (self.fetch, self.fetch);
        self.confirm();
    }

    /// After resets that found nothing more to do: whether there is still something to reset or to take before `fetch`.
    /// The ring was out of step before it came back then.
    pub(crate) fn is_out_of_step(&self) -> bool {
        self.flags(self.fetch.wrapping_sub(1)) != EMPTY
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::{DIRTY, Entry, Recycle};
    use super::*;

    fn ring(flags: &[(usize, u32)], position: u32) -> (Arc<[Entry]>, DirtyRing) {
        let size = RingSize::from_entries(256).unwrap();
        let entries: Arc<[Entry]> = (0..256).map(|_| Entry::default()).collect();
        for (at, flag) in flags {
            entries[*at].flags.store(*flag, Ordering::Relaxed);
        }
        let ring = DirtyRing::over(Arc::clone(&entries), Arc::default(), size, position);
        (entries, ring)
    }

    #[test]
    fn a_borrower_publishes_each_position_that_it_has_taken_up_to() {
        let (_entries, ring) = ring(&[(3, DIRTY), (4, DIRTY)], 3);
        let seen = Arc::new(AtomicU32::new(0));
        let published = Arc::clone(&seen);
        let mut ring = ring.borrow(move |position| published.store(position, Ordering::Relaxed));
        assert_eq!(seen.load(Ordering::Relaxed), 3);
        assert_eq!(ring.take(Recycle::Protecting, |_, _| {}), 2);
        assert_eq!(seen.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn a_lender_finds_its_place_whether_or_not_the_borrower_had_published_its_last_step() {
        for published in [4, 6, 7] {
            // Reset up to 4, taken up to 7, dirty up to 9, and over the end of the ring.
            for shift in [0, 250] {
                let at = |entry: usize| (entry + shift) % 256;
                let flags = [(4, RESET), (5, RESET), (6, RESET), (7, DIRTY), (8, DIRTY)];
                let (entries, mut ring) = ring(&flags.map(|(entry, flag)| (at(entry), flag)), 0);
                ring.follow_borrower(published + u32::try_from(shift).unwrap());
                assert_eq!(ring.position() % 256, u32::try_from(at(7)).unwrap());
                assert!(ring.is_out_of_step(), "nothing is reset yet");
                (4..7).for_each(|entry| entries[at(entry)].flags.store(EMPTY, Ordering::Relaxed));
                assert!(!ring.is_out_of_step());
                assert_eq!(ring.take(Recycle::Protecting, |_, _| {}), 2);
            }
        }
    }

    #[test]
    fn a_ring_that_was_taken_to_its_last_entry_is_followed_once_around_and_no_further() {
        let all: Vec<(usize, u32)> = (0..256).map(|entry| (entry, RESET)).collect();
        let (_entries, mut ring) = ring(&all, 0);
        ring.follow_borrower(10);
        assert_eq!(ring.position(), 266);
    }
}
