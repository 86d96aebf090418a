//! The dirty rate of a VM that logs nothing: read some of its pages twice, and see how many changed.
//!
//! This is what QEMU's calc-dirty-rate does by default, with its 512 pages per GiB as the lower bound. It works on
//! any VMM, tells nothing about vCPUs, and counts a page once however often it was written. A write of the same value
//! is missed, and no sample size mends that: the stated error is that of sampling alone.

use std::io::{self, IoSliceMut};
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::{Error, PAGE_BYTES, Slot, Vm};

/// QEMU's DIRTYRATE_DEFAULT_SAMPLE_PAGES.
const SAMPLES_PER_GIB: u64 = 512;
/// Small guests are cheap to sample better: 4 MiB are read per look.
const SAMPLES_MIN: u64 = 1024;
/// 256 MiB per look, for guests of 128 GiB and more.
const SAMPLES_MAX: u64 = 65536;
/// Pages per system call.
const BATCH: usize = 64;

/// How many standard deviations 95 % of a normal distribution lie within.
const Z95: f64 = 1.96;

/// What sampling says about one interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Pages of the guest that changed, estimated.
    pub dirty_pages: f64,
    /// Lower end of the 95 % confidence interval.
    pub dirty_pages_low: f64,
    /// Upper end of it.
    pub dirty_pages_high: f64,
    /// Pages that were compared.
    pub sampled_pages: u64,
    /// Time between the two readings.
    pub interval: Duration,
}

impl Estimate {
    /// Wilson's score interval for `changed` of `sampled` pages, scaled to `pages`. The sample is stratified, which can
    /// only narrow the error that is stated here.
    fn new(changed: u64, sampled: u64, pages: u64, interval: Duration) -> Self {
        let (changed, n, all) = (changed as f64, sampled.max(1) as f64, pages as f64);
        let share = changed / n;
        let z2 = Z95 * Z95;
        let middle = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
        Self {
            dirty_pages: share * all,
            dirty_pages_low: (middle - half).max(0.0) * all,
            dirty_pages_high: (middle + half).min(1.0) * all,
            sampled_pages: sampled,
            interval,
        }
    }

    /// The larger of the two distances from the estimate to the ends of its interval, in pages.
    pub fn error_pages(&self) -> f64 {
        (self.dirty_pages_high - self.dirty_pages).max(self.dirty_pages - self.dirty_pages_low)
    }
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    address: u64,
    /// `None` for a page that could not be read, such as a hole in the mapping.
    hash: Option<u64>,
}

/// Samples the memory of one VM, again and again.
#[derive(Debug)]
pub struct PageSampler {
    pid: Pid,
    samples: Vec<Sample>,
    pages: u64,
    read_at: Instant,
    round: u64,
}

impl PageSampler {
    /// Chooses pages and reads them for the first time.
    ///
    /// # Errors
    ///
    /// If the process is gone, or its memory may not be read (that takes CAP_SYS_PTRACE or the same user).
    pub fn start(vm: &Vm) -> Result<Self, Error> {
        let pid = Pid::from_raw(i32::try_from(vm.pid).unwrap_or(i32::MAX));
        let mut sampler = Self { pid, samples: Vec::new(), pages: 0, read_at: Instant::now(), round: 0 };
        sampler.choose(vm)?;
        Ok(sampler)
    }

    /// Reads the pages again, and chooses others for the next interval.
    ///
    /// # Errors
    ///
    /// As [`PageSampler::start`].
    pub fn look(&mut self, vm: &Vm) -> Result<Estimate, Error> {
        let before = std::mem::take(&mut self.samples);
        let (pages, read_at) = (self.pages, self.read_at);
        let mut after = before.clone();
        let now = Instant::now();
        read(self.pid, &mut after)?;
        let compared =
            before.iter().zip(&after).filter_map(|(before, after)| Some((before.hash?, after.hash?)));
        let (mut sampled, mut changed) = (0, 0);
        for (before, after) in compared {
            sampled += 1;
            changed += u64::from(before != after);
        }
        self.choose(vm)?;
        Ok(Estimate::new(changed, sampled, pages, now - read_at))
    }

    /// One random page from each of as many equal parts of the memory as there are samples.
    fn choose(&mut self, vm: &Vm) -> Result<(), Error> {
        // The second address space repeats the first for system management mode.
        let memory: Vec<&Slot> = vm.slots.iter().filter(|slot| slot.slot >> 16 == 0).collect();
        self.pages = memory.iter().map(|slot| slot.pages).sum();
        let wanted = self.pages * SAMPLES_PER_GIB / (1 << 18);
        let wanted = wanted.clamp(SAMPLES_MIN, SAMPLES_MAX).min(self.pages);
        self.round += 1;
        self.samples = (0..wanted)
            .filter_map(|index| {
                let part = |index: u64| {
                    u64::try_from(u128::from(self.pages) * u128::from(index) / u128::from(wanted))
                };
                let (first, next) = (part(index).ok()?, part(index + 1).ok()?);
                let random = xxh3_64_with_seed(&index.to_ne_bytes(), self.round);
                let address = address_of(&memory, first + random % (next - first).max(1))?;
                Some(Sample { address, hash: None })
            })
            .collect();
        self.read_at = Instant::now();
        read(self.pid, &mut self.samples)
    }
}

fn address_of(memory: &[&Slot], mut page: u64) -> Option<u64> {
    for slot in memory {
        if page < slot.pages {
            return Some(slot.address + page * PAGE_BYTES);
        }
        page -= slot.pages;
    }
    None
}

/// Reads and hashes the samples' pages.
fn read(pid: Pid, samples: &mut [Sample]) -> Result<(), Error> {
    const PAGE: usize = 4096;
    let mut buffer = vec![0_u8; BATCH * PAGE];
    for batch in samples.chunks_mut(BATCH) {
        let mut start = 0;
        while start < batch.len() {
            let remote: Vec<RemoteIoVec> = batch[start..]
                .iter()
                .filter_map(|sample| {
                    Some(RemoteIoVec { base: usize::try_from(sample.address).ok()?, len: PAGE })
                })
                .collect();
            let local = &mut buffer[..remote.len() * PAGE];
            let whole = match process_vm_readv(pid, &mut [IoSliceMut::new(local)], &remote) {
                Ok(bytes) => bytes / PAGE,
                Err(nix::Error::EFAULT) => 0,
                Err(error) => {
                    let doing = format!("read the guest memory in process {pid}");
                    return Err(Error::Read { doing, error: io::Error::from(error) });
                }
            };
            for (sample, page) in batch[start..].iter_mut().zip(buffer.chunks(PAGE)).take(whole) {
                sample.hash = Some(xxh3_64(page));
            }
            start += whole;
            // It stops at a page that is not there: leave that one out and go on behind it.
            if let Some(sample) = batch.get_mut(start) {
                sample.hash = None;
                start += 1;
            }
        }
    }
    Ok(())
}
