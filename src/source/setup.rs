//! The first phase: both sides agree on a version, features and the VM's shape, and the data connections are made. The
//! guest runs, and nothing has to be undone yet.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::error::SourceError;
use super::link::{Link, refusal, tell_of_the_end};
use super::migration::Migration;
use crate::layout::{PAGE_SIZE, PageRun};
use crate::track::DirtySource;
use crate::transport::control::{ControlConnection, ControlError, Wait};
use crate::transport::{ChannelSpec, MigrationToken, SendOptions, Sender, dial, socket};
use crate::vm::Vm;
use crate::wire::control::Message;
use crate::wire::features::{self, Feature};
use crate::wire::hello::{Accept, Block, Hello, Token};

/// Connects to the destination and offers it the VM.
pub(super) fn run<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
) -> Result<Link, SourceError> {
    let (options, progress) = (&migration.options, migration.progress.clone());
    let cancel = progress.parameters().cancel_flag();
    let wait = Wait { deadline: Instant::now() + options.answer_timeout, cancel };
    let unreachable = |source| ControlError::Connect { address: options.destination.clone(), source };
    let stream = dial::dial(&options.destination, options.answer_timeout, cancel).map_err(unreachable)?;
    let peer = stream.peer_addr().map_err(unreachable)?;
    socket::prepare(&stream, options.peer_timeout).map_err(unreachable)?;
    let control = ControlConnection::keep(Arc::new(stream), options.peer_timeout)?;
    match offer(migration, &control, peer, wait) {
        Ok((sender, may_call_off)) => Ok(Link::new(control, sender, may_call_off)),
        Err(error) => {
            let error = migration.cancelled_or(error);
            tell_of_the_end(&control, &error);
            Err(error)
        }
    }
}

/// Offers the destination the VM, and makes the data connections that it asks for; and whether it can forget the state of
/// a machine that runs on.
fn offer<V: Vm + ?Sized, D: DirtySource + ?Sized>(
    migration: &mut Migration<'_, V, D>,
    control: &ControlConnection,
    peer: SocketAddr,
    wait: Wait<'_>,
) -> Result<(Sender, bool), SourceError> {
    let options = &migration.options;
    let parameters = migration.progress.parameters();
    let token = random_token()?;
    let channels = match options.channel_specs.len() {
        0 => options.channels,
        given => as_u32(given),
    };
    let features = Feature::ours(if options.verify { &[features::VERIFY] } else { &[] });
    let ram: Vec<PageRun> = migration.memory.regions().iter().map(|region| region.pages).collect();
    control.send(
        &Message::Hello(Hello {
            token,
            page_bytes: as_u32(PAGE_SIZE),
            vcpus: options.vcpus,
            channels,
            ram,
            blocks: migration
                .memory
                .blocks()
                .map(|(name, pages)| Block { name: name.to_owned(), pages })
                .collect(),
            vm_id: options.vm_id.clone(),
            description: options.description.clone(),
            features: features.clone(),
            ..Hello::default()
        }),
        wait,
    )?;
    // The first answer says how long a round trip is, before anything is planned.
    control.ping(wait)?;
    let accept = match control.receive("Accept", wait)? {
        Message::Accept(accept) => accept,
        other => return Err(refusal(other, "Accept")),
    };
    agree(&features, &accept)?;

    let mut remote = peer;
    remote.set_port(accept.data_port);
    let specs = if options.channel_specs.is_empty() {
        vec![ChannelSpec::to(remote); channels as usize]
    } else {
        options.channel_specs.clone()
    };
    let send = SendOptions { max_bandwidth: parameters.max_bandwidth().clone(), ..options.send.clone() };
    let sender = Sender::connect(&specs, MigrationToken(token), migration.memory.clone(), send, wait.cancel)?;
    migration.report.channels = channels;
    migration.report.memory_bytes = migration.memory.pages() * PAGE_SIZE as u64;
    migration.tracker.backend().clone_into(&mut migration.report.backend);
    Ok((sender, accept.features.iter().any(|feature| feature == features::CALL_OFF)))
}

fn agree(ours: &[Feature], accept: &Accept) -> Result<(), SourceError> {
    if features::common_version(accept.version, accept.version).is_none() {
        return Err(SourceError::Incompatible { what: format!("protocol version {}", accept.version) });
    }
    let agreed = |feature: &&Feature| accept.features.contains(&feature.name);
    match ours.iter().find(|feature| feature.required && !agreed(feature)) {
        Some(missing) => Err(SourceError::Incompatible { what: format!("the feature `{}`", missing.name) }),
        None => Ok(()),
    }
}

/// A migration's name on its connections.
fn random_token() -> Result<Token, SourceError> {
    let mut token = Token::default();
    getrandom::fill(&mut token).map_err(|error| ControlError::Connect {
        address: "the kernel's random numbers".to_owned(),
        source: error.into(),
    })?;
    Ok(token)
}

/// For lengths and counts that are bounded far below 2³² by construction.
fn as_u32(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
