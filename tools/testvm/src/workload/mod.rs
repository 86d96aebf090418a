//! What the test guest does: the same code in the guest, where it runs on bare vCPUs, and on the host, where
//! ordinary threads run it over any mapping and tests run it against a model.
//!
//! `command_line` says what is wanted, `ranges` deals out the RAM, `setup` publishes both in the `mailbox`, and
//! `vcpu` does the work: it takes a page from its `pattern`, stamps it (`page`) and keeps the counts from which
//! `check` proves that no write was lost. No file here needs an allocator, the
//! standard library or unsafe code: memory, clock and waiting are a [`Machine`]'s.
//!
//! `tools/testvm/guest` includes this directory; nothing in it may refer to the rest of the crate.

pub mod command_line;
pub mod mailbox;
pub mod page;
pub mod pattern;
pub mod ranges;
pub mod setup;
pub mod vcpu;

/// What the workload runs on: a bare vCPU, a host thread, or a test's model.
///
/// Addresses are guest physical, in bytes, and lie inside guest RAM.
pub trait Machine {
    /// Reads the aligned word at `address`.
    fn load(&self, address: u64) -> u64;

    /// Writes the aligned word at `address`. Not reordered with any other store.
    fn store(&mut self, address: u64, value: u64);

    /// Writes two words to an address that is a multiple of 16, in one instruction: whoever stops the vCPU sees
    /// both or none. Not reordered with any other store.
    fn store_pair(&mut self, address: u64, first: u64, second: u64);

    /// Writes words from `address` on, in order.
    #[inline]
    fn store_words(&mut self, address: u64, words: impl Iterator<Item = u64>)
    where
        Self: Sized,
    {
        for (at, word) in (address..).step_by(8).zip(words) {
            self.store(at, word);
        }
    }

    /// Writes the aligned word at `address` and gives what was there. In one step, where a machine has several vCPUs.
    #[inline]
    fn swap(&mut self, address: u64, value: u64) -> u64 {
        let before = self.load(address);
        self.store(address, value);
        before
    }

    /// From here on the vCPU works as a guest's kernel does, or as a program again, and a VMM can see which.
    #[inline]
    fn set_kernel_mode(&mut self, _in_kernel: bool) {}

    /// The clock by which gaps are measured and work is paced; ticks at [`mailbox::Header::tsc_khz`]. Not
    /// reordered with loads and stores.
    fn ticks(&self) -> u64;

    /// Gives the CPU away for `microseconds` if that is possible; may return at once.
    fn wait(&mut self, microseconds: u32);

    /// Spins a little.
    fn relax(&self);
}
