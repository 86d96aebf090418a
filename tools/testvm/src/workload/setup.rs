//! Before the work: the plan that a configuration and the guest's RAM make, and publishing it in the mailbox.

use core::fmt;
use core::mem::offset_of;

use super::Machine;
use super::command_line::{Config, ConfigError, Content, Pattern, Work};
use super::mailbox::{
    Control, Extent, GuestState, Header, MAGIC, MAILBOX_ADDRESS, MAILBOX_END, MAX_ERROR_BYTES, MAX_EXTENTS,
    MAX_VCPUS, PAGE_BYTES, RESERVED_END, Share, VERSION, control_address, header_field,
};
use super::ranges::{self, Extents, RangeError};

/// Guest frame numbers lie below: a page's tag has room for no more.
const PAGES_MAX: u64 = 1 << 34;

/// What all vCPUs do and where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The RAM that the workload uses.
    pub pool: Extents,
    /// How many vCPUs run.
    pub vcpus: usize,
    /// Frequency of the clock.
    pub tsc_khz: u64,
    /// Who has which part of the pool.
    pub shares: [Share; MAX_VCPUS],
}

/// Why a guest cannot start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetupError<'a> {
    /// The command line.
    Config(ConfigError<'a>),
    /// The RAM.
    Range(RangeError),
}

impl fmt::Display for SetupError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(error) => error.fmt(f),
            Self::Range(error) => error.fmt(f),
        }
    }
}

/// Makes the whole mailbox zero.
pub fn clear(machine: &mut impl Machine) {
    for address in (MAILBOX_ADDRESS..MAILBOX_END).step_by(8) {
        machine.store(address, 0);
    }
}

impl Plan {
    /// Deals out `pool` as `config` wants it.
    ///
    /// # Errors
    ///
    /// [`RangeError`].
    pub fn new(pool: Extents, vcpus: usize, tsc_khz: u64, config: &Config) -> Result<Self, RangeError> {
        let shares = ranges::deal(pool.pages(), vcpus, config)?;
        Ok(Self { pool, vcpus, tsc_khz, shares })
    }

    /// Puts the plan and each vCPU's first work into the cleared mailbox and lets the vCPUs begin.
    pub fn publish(&self, machine: &mut impl Machine, config: &Config) {
        for (vcpu, work) in config.work.iter().enumerate().take(self.vcpus) {
            store_work(machine, vcpu, work);
        }
        let mut set = |offset, value| machine.store(header_field(offset), value);
        set(offset_of!(Header, version), VERSION);
        set(offset_of!(Header, vcpus), self.vcpus as u64);
        set(offset_of!(Header, tsc_khz), self.tsc_khz);
        set(offset_of!(Header, extents_count), self.pool.as_slice().len() as u64);
        for (index, extent) in self.pool.as_slice().iter().enumerate() {
            let at = offset_of!(Header, extents) + index * size_of::<Extent>();
            set(at + offset_of!(Extent, first), extent.first);
            set(at + offset_of!(Extent, pages), extent.pages);
        }
        for (index, share) in self.shares.iter().enumerate() {
            let at = offset_of!(Header, shares) + index * size_of::<Share>();
            set(at + offset_of!(Share, first), share.first);
            set(at + offset_of!(Share, pages), share.pages);
            set(at + offset_of!(Share, fill_first), share.fill_first);
            set(at + offset_of!(Share, fill_pages), share.fill_pages);
        }
        set(offset_of!(Header, state), GuestState::Running as u64);
        set(offset_of!(Header, magic), MAGIC);
    }

    /// The plan that the mailbox holds; `None` if it holds none, or one that cannot be.
    pub fn read(machine: &impl Machine) -> Option<Self> {
        let get = |offset| machine.load(header_field(offset));
        if get(offset_of!(Header, magic)) != MAGIC
            || get(offset_of!(Header, version)) != VERSION
            || GuestState::from_word(get(offset_of!(Header, state)))? != GuestState::Running
        {
            return None;
        }
        let below = |offset, bound| usize::try_from(get(offset)).ok().filter(|count| *count <= bound);
        let extents = below(offset_of!(Header, extents_count), MAX_EXTENTS)?;
        let vcpus = below(offset_of!(Header, vcpus), MAX_VCPUS)?;
        let pool: Extents = (0..extents)
            .map(|index| {
                let at = offset_of!(Header, extents) + index * size_of::<Extent>();
                Extent {
                    first: get(at + offset_of!(Extent, first)),
                    pages: get(at + offset_of!(Extent, pages)),
                }
            })
            .collect();
        let mut shares = [Share::default(); MAX_VCPUS];
        for (index, share) in shares.iter_mut().enumerate() {
            let at = offset_of!(Header, shares) + index * size_of::<Share>();
            *share = Share {
                first: get(at + offset_of!(Share, first)),
                pages: get(at + offset_of!(Share, pages)),
                fill_first: get(at + offset_of!(Share, fill_first)),
                fill_pages: get(at + offset_of!(Share, fill_pages)),
            };
        }
        let plan = Self { pool, vcpus, tsc_khz: get(offset_of!(Header, tsc_khz)), shares };
        plan.is_possible().then_some(plan)
    }

    /// What the mailbox says may be anything: no page twice, none outside its bounds, no sum that overflows.
    fn is_possible(&self) -> bool {
        let mut free_from = RESERVED_END / PAGE_BYTES;
        for extent in self.pool.as_slice() {
            let end = extent.first.checked_add(extent.pages).filter(|end| *end <= PAGES_MAX);
            let Some(end) = end else { return false };
            if extent.first < free_from {
                return false;
            }
            free_from = end;
        }
        let pool = self.pool.pages();
        let mut dealt = 0;
        self.tsc_khz > 0
            && self.shares[..self.vcpus].iter().all(|share| {
                let follows = share.first == dealt;
                dealt = dealt.saturating_add(share.pages);
                let fill_end = share.fill_first.checked_add(share.fill_pages);
                follows && dealt <= pool && fill_end.is_some_and(|end| end <= share.pages)
            })
    }

    /// The pages of a vCPU's share.
    pub fn share_of(&self, vcpu: usize) -> Extents {
        self.pool.part(self.shares[vcpu].first, self.shares[vcpu].pages)
    }
}

/// Says in the cleared mailbox that the guest cannot go on, and why.
pub fn publish_failure(machine: &mut impl Machine, reason: &impl fmt::Display) {
    let mut text = Text { bytes: [0; MAX_ERROR_BYTES], length: 0 };
    // It cannot fail: what does not fit is left out.
    let _ = fmt::write(&mut text, format_args!("{reason}"));
    for (index, word) in text.bytes.as_chunks().0.iter().enumerate() {
        machine.store(header_field(offset_of!(Header, error) + index * 8), u64::from_le_bytes(*word));
    }
    machine.store(header_field(offset_of!(Header, error_bytes)), text.length as u64);
    machine.store(header_field(offset_of!(Header, version)), VERSION);
    machine.store(header_field(offset_of!(Header, state)), GuestState::Failed as u64);
    machine.store(header_field(offset_of!(Header, magic)), MAGIC);
}

struct Text {
    bytes: [u8; MAX_ERROR_BYTES],
    length: usize,
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if let Some(free) = self.bytes.get_mut(self.length) {
                *free = byte;
                self.length += 1;
            }
        }
        Ok(())
    }
}

/// Stores the fields of `work` in vCPU `vcpu`'s control page; the sequence is the caller's.
pub fn store_work(machine: &mut impl Machine, vcpu: usize, work: &Work) {
    let mut set = |offset, value| machine.store(control_address(vcpu) + offset as u64, value);
    set(offset_of!(Control, pattern), work.pattern as u64);
    set(offset_of!(Control, content), work.content as u64);
    set(offset_of!(Control, working_set_pages), work.working_set_pages);
    set(offset_of!(Control, bytes_per_page), work.bytes_per_page);
    set(offset_of!(Control, pace_per_s), work.pace_per_s);
    set(offset_of!(Control, lock), work.lock.into());
}

/// The work in vCPU `vcpu`'s control page; `None` if it asks for what does not exist.
pub fn load_work(machine: &impl Machine, vcpu: usize) -> Option<Work> {
    let get = |offset| machine.load(control_address(vcpu) + offset as u64);
    Some(Work {
        pattern: Pattern::from_word(get(offset_of!(Control, pattern)))?,
        content: Content::from_word(get(offset_of!(Control, content)))?,
        working_set_pages: get(offset_of!(Control, working_set_pages)),
        bytes_per_page: get(offset_of!(Control, bytes_per_page)),
        pace_per_s: get(offset_of!(Control, pace_per_s)),
        lock: get(offset_of!(Control, lock)) == 1,
    })
}
