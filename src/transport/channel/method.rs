//! How the pages of a frame leave: copied, zero-copy, or zero-copy out of registered memory; and what is said
//! about it.

use std::io;
use std::time::Duration;

use crate::layout::{GuestMemory, HostRun, PageRun};
use crate::page::{self, Encoder, Piece};
use crate::transport::counters::Sending;
use crate::transport::policy::{self, Policy, ZeroCopy};
use crate::transport::session::Session;
use crate::transport::uring::{RegisteredBuffers, Registration, SendMethod, SendRing};

/// Holes up to this size are registered, and with that populated, rather than cut a buffer in two.
const EXTENT_GAP_PAGES: u64 = 64;

/// How one frame leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub method: SendMethod,
    /// Of its runs' length.
    class: u8,
}

/// One connection's way of sending.
pub(super) struct Method {
    wish: ZeroCopy,
    policy: Policy,
    registration: Option<Registration>,
    registration_tried: bool,
    registered_bytes: u64,
    /// How often guest memory had been discarded when this channel last looked.
    discards: u64,
    /// Registration ended, or never began, because the VMM discarded guest memory.
    waits_for_vmm: bool,
    fallback: Option<String>,
}

impl Method {
    pub(super) fn new(wish: ZeroCopy, may_register: bool, discards: u64) -> Self {
        Self {
            wish,
            policy: Policy::new(wish),
            registration: None,
            registration_tried: !(may_register || wish == ZeroCopy::AlwaysRegistered),
            registered_bytes: 0,
            discards,
            waits_for_vmm: false,
            fallback: None,
        }
    }

    /// How a frame shall leave that was encoded so. Staged bytes are copied: the kernel may look at zero-copied memory
    /// until the peer has acknowledged it, and their buffer is used again before that.
    pub(super) fn choose(&mut self, encoded: &Encoder, ring: &SendRing, session: &Session) -> Choice {
        self.heed_discards(ring, session);
        let payload = encoded.pieces();
        let class = policy::class_of(encoded.content_pages(), payload.len());
        let is_ram = |piece: &Piece| matches!(piece, Piece::Ram(_));
        if payload.is_empty() || !payload.iter().all(is_ram) || !self.policy.zero_copy(class) {
            return Choice { method: SendMethod::Copy, class };
        }
        if self.policy.pays_to_register() && !self.registration_tried {
            self.registration_tried = true;
            self.register(ring, session);
        }
        let buffer = self.registration.as_ref().and_then(|table| table.buffer_of(payload));
        Choice { method: buffer.map_or(SendMethod::ZeroCopy, SendMethod::ZeroCopyFixed), class }
    }

    /// A frame of `bytes` went, and cost our thread `cpu`.
    pub(super) fn sent(&mut self, choice: Choice, cpu: Duration, bytes: u64) {
        self.policy.sent(choice.class, choice.method != SendMethod::Copy, cpu, bytes);
    }

    /// The kernel's report about a zero-copy send.
    pub(super) fn reported(&mut self, copied: bool) {
        self.policy.reported(copied);
    }

    /// A zero-copy send was refused: no more of them.
    pub(super) fn refused(&mut self, error: &io::Error) {
        let advice = match error.raw_os_error() {
            Some(libc::ENOMEM | libc::ENOBUFS) => "raise RLIMIT_MEMLOCK (ulimit -l) or give CAP_IPC_LOCK",
            _ => "this kernel or socket cannot do it",
        };
        self.policy.refused();
        self.fall_back(format!("zero-copy sends: {error}: {advice}"));
    }

    /// Remembers why something better was given up.
    pub(super) fn fall_back(&mut self, reason: String) {
        tracing::info!(reason, "a channel sends by lesser means");
        self.fallback = Some(reason);
    }

    /// For reports, beside `window_bytes` that may be under way.
    pub(super) fn sending(&self, window_bytes: u64) -> Sending {
        Sending {
            copies: self.policy.copies(),
            zero_copy_from_pages: self.policy.threshold_pages(),
            registered_bytes: self.registered_bytes,
            fallback: self.fallback.clone(),
            window_bytes,
        }
    }

    /// Gives registered memory up once the VMM has discarded guest memory, as the kernel holds the old pages; until the VMM says
    /// that it is done with that.
    pub(super) fn heed_discards(&mut self, ring: &SendRing, session: &Session) {
        let discards = &session.options.discards;
        let count = discards.count();
        if count == self.discards {
            if self.waits_for_vmm && discards.is_settled_at(count) {
                (self.waits_for_vmm, self.registration_tried) = (false, false);
            }
            return;
        }
        self.discards = count;
        // Unless this channel may not register at all, or could not.
        self.waits_for_vmm |= !self.registration_tried || self.registration.is_some();
        self.registration_tried = true;
        if self.registration.take().is_none() {
            return;
        }
        let reason =
            "registered guest RAM was given up: the VMM discards guest memory while it migrates".to_owned();
        // The table is gone, whatever the kernel says: nothing is sent out of it any more.
        if let Err(error) = ring.unregister() {
            tracing::warn!(%error, "registered guest RAM stays pinned until its channel ends");
        }
        session.registered.lock().take_if(|(at, _)| *at < count);
        self.registered_bytes = 0;
        self.fall_back(reason);
    }

    /// Registers guest RAM, or takes over what another channel registered.
    fn register(&mut self, ring: &SendRing, session: &Session) {
        let memory = &session.memory;
        let mut shared = session.registered.lock();
        // Of a channel that has not looked yet.
        shared.take_if(|(at, _)| *at < self.discards);
        // Memory that was discarded is not to be populated by that.
        let (wish, gap) = match self.discards == session.discards_before() {
            true => (self.wish, EXTENT_GAP_PAGES),
            false => (ZeroCopy::Auto, 0),
        };
        let (_, buffers) = shared.get_or_insert_with(|| {
            let registered = RegisteredBuffers::new(memory, &extents(wish, gap, memory));
            let registered =
                registered.map_err(|error| format!("registering guest RAM: {error}: {}", advice(&error)));
            (self.discards, registered)
        });
        let result = buffers.as_ref().map_err(Clone::clone).and_then(|buffers| {
            let registration = ring.register(buffers).map_err(|error| {
                format!("registering guest RAM: taking over the table: {error}: {}", advice(&error))
            })?;
            Ok((registration, buffers.bytes()))
        });
        match result {
            Ok((registration, bytes)) => {
                self.registered_bytes = bytes;
                self.registration = Some(registration);
                self.fallback = None;
            }
            Err(reason) => self.fall_back(reason),
        }
    }
}

/// What is worth registering: what is populated, as far as it lies together but for `gap` pages. All of RAM, where that is asked
/// for.
fn extents(wish: ZeroCopy, gap: u64, memory: &GuestMemory) -> Vec<HostRun> {
    let regions = memory.regions().iter().map(|region| region.pages);
    let runs: Vec<PageRun> = if wish == ZeroCopy::AlwaysRegistered {
        regions.collect()
    } else {
        let populated = page::populated(memory).pages;
        let mut extents: Vec<PageRun> = Vec::new();
        for region in regions {
            let in_region = extents.len();
            for run in populated.runs_within(region) {
                match extents[in_region..].last_mut() {
                    Some(last) if run.first.0 - last.end().0 <= gap => {
                        last.pages = run.end().0 - last.first.0;
                    }
                    _ => extents.push(run),
                }
            }
        }
        extents
    };
    runs.into_iter().filter_map(|run| memory.host_runs(run).ok()).flatten().collect()
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "raise RLIMIT_MEMLOCK (ulimit -l) to the size of guest RAM or give CAP_IPC_LOCK"
        }
        Some(libc::EFAULT | libc::EOPNOTSUPP) => {
            "memory from a shared file of a disk file system cannot be pinned"
        }
        Some(libc::EMFILE) => "guest RAM is in too many pieces",
        _ => "pages are pinned for each send instead",
    }
}
