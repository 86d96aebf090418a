//! The first phase: an offered VM is accepted or refused, and data connections are awaited.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::error::DestinationError;
use super::incoming::Incoming;
use super::options::DestinationOptions;
use super::receive::Receiving;
use crate::layout::{GuestMemory, PAGE_SIZE, PageRun};
use crate::transport::MigrationToken;
use crate::transport::control::Wait;
use crate::wire::CHANNELS_MAX;
use crate::wire::control::Message;
use crate::wire::features::{self, Feature};
use crate::wire::hello::{Accept, Block, Hello};
use crate::wire::reason::Reason;

/// How long the source is told that it is welcome.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Begins to receive, and says so to the source.
pub(super) fn run(
    incoming: &Incoming,
    memory: &GuestMemory,
    options: &DestinationOptions,
    cancel: &AtomicBool,
) -> Result<Receiving, DestinationError> {
    let verify = incoming.hello().features.iter().any(|f| f.name == features::VERIFY && f.required);
    let receiver = incoming.data.receive(MigrationToken(incoming.hello().token), memory.clone(), cancel)?;
    incoming.control.watch_elsewhere(receiver.bytes_arrived());
    let receiving = Receiving::new(receiver, memory, verify, options)?;
    let accept = Accept {
        version: features::common_version(incoming.hello().oldest, incoming.hello().newest)
            .unwrap_or(features::NEWEST),
        data_port: incoming.data.addresses().first().map_or(0, std::net::SocketAddr::port),
        features: features::agree(&Feature::ours(&[]), &incoming.hello().features).unwrap_or_default(),
    };
    let wait = Wait { deadline: Instant::now() + TELL_TIMEOUT, cancel };
    incoming.control.send(&Message::Accept(accept), wait)?;
    Ok(receiving)
}

/// Why the VM that was built here is not the one that is offered.
pub(super) fn mismatch(hello: &Hello, vcpus: u32, memory: &GuestMemory) -> Option<String> {
    let ours: Vec<PageRun> = memory.regions().iter().map(|region| region.pages).collect();
    let bytes = |runs: &[PageRun]| runs.iter().map(|r| u128::from(r.pages)).sum::<u128>() << 12;
    let (have, need) = (bytes(&ours), bytes(&hello.ram));
    if vcpus != hello.vcpus {
        Some(format!("the VM has {} vCPUs, the destination's {vcpus}", hello.vcpus))
    } else if have != need {
        Some(format!(
            "the VM has {} MiB of RAM, the destination's {} MiB: start the destination with the same size",
            need >> 20,
            have >> 20
        ))
    } else if merged(&ours) != merged(&hello.ram) {
        Some("the VM's RAM lies at other guest addresses than the destination's".to_owned())
    } else {
        let missing = hello.blocks.iter().find(|block| !has_block(memory, block));
        missing.map(|block| format!("the VM's block of memory `{}` is none of the destination's", block.name))
    }
}

fn has_block(memory: &GuestMemory, block: &Block) -> bool {
    memory.blocks().any(|(name, pages)| name == block.name && pages == block.pages)
}

/// Why a Hello is refused whatever the VMM can build.
pub(super) fn objection(hello: &Hello) -> Option<(Reason, String)> {
    let Hello { newest, oldest, page_bytes, channels, .. } = *hello;
    if features::common_version(oldest, newest).is_none() {
        let theirs = if oldest == newest { newest.to_string() } else { format!("{oldest} to {newest}") };
        let ours = features::NEWEST;
        let text =
            format!("the source speaks protocol {theirs}, this destination {ours}: use the same version");
        return Some((Reason::Version, text));
    }
    if let Err(missing) = features::agree(&Feature::ours(&[]), &hello.features) {
        let text = format!("the source needs the feature `{missing}`, which this destination does not have");
        return Some((Reason::Feature, text));
    }
    if hello.resume.is_some() {
        return Some((Reason::Feature, "this destination keeps no session that could be resumed".to_owned()));
    }
    if usize::try_from(page_bytes) != Ok(PAGE_SIZE) {
        let text = format!("the source's pages have {page_bytes} bytes, this destination's {PAGE_SIZE}");
        return Some((Reason::Layout, text));
    }
    if channels == 0 || channels > u32::from(CHANNELS_MAX) {
        let text = format!("{channels} data connections asked for, 1 to {CHANNELS_MAX} are possible");
        return Some((Reason::Protocol, text));
    }
    None
}

/// Adjacent runs joined, so that two hosts may cut the same RAM into slots differently.
fn merged(runs: &[PageRun]) -> Vec<PageRun> {
    let mut merged: Vec<PageRun> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.first.0.checked_add(last.pages) == Some(run.first.0) => {
                last.pages = last.pages.saturating_add(run.pages);
            }
            _ => merged.push(*run),
        }
    }
    merged
}
