//! The two messages of the handshake: what the source says of itself and its VM, and what the destination agrees to.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::ControlFormatError;
use super::features::{self, Feature};
use super::parts::{self, Part, Parts, is_name};
use crate::layout::{PageIndex, PageRun};

/// Most regions of RAM: KVM has 32764 slots, VMMs use a few dozen for RAM.
pub const MAX_REGIONS: usize = 1024;
/// Most blocks of memory outside guest-physical space.
pub const MAX_BLOCKS: usize = 64;
/// Longest description of the VM by its VMM.
pub const MAX_DESCRIPTION_BYTES: usize = 32 << 10;

/// Identifies one migration on each of its connections. Random, from the source.
pub type Token = [u8; 16];

/// Parts of a Hello, by name.
mod part {
    pub const VM: &str = "vm";
    pub const RAM: &str = "ram";
    pub const BLOCKS: &str = "blocks";
    pub const VM_ID: &str = "vm-id";
    pub const DESCRIPTION: &str = "vm-description";
    pub const FEATURES: &str = "features";
    pub const RESUME: &str = "resume-session";
}

/// A block of memory outside guest-physical space, such as a framebuffer or a ROM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Block {
    /// Its name, which both sides give it.
    pub name: String,
    /// The page indexes that stand for it.
    pub pages: PageRun,
}

/// The source introduces itself and the VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The newest protocol that the source speaks.
    pub newest: u16,
    /// The oldest.
    pub oldest: u16,
    /// Identifies this migration.
    pub token: Token,
    /// Bytes in a page.
    pub page_bytes: u32,
    /// vCPUs of the VM.
    pub vcpus: u32,
    /// Data connections that the source is going to open.
    pub channels: u32,
    /// RAM in guest-physical order.
    pub ram: Vec<PageRun>,
    /// Memory beside it.
    pub blocks: Vec<Block>,
    /// The VM's name among those of its owner; may be empty.
    pub vm_id: String,
    /// What the source's VMM says of the VM, so that the destination's VMM can build it; its own format.
    pub description: Vec<u8>,
    /// What the source can do, and what it needs.
    pub features: Vec<Feature>,
    /// The migration that this connection goes on with, after its connections were lost.
    pub resume: Option<Token>,
}

impl Default for Hello {
    /// A VM without anything, in this build's versions.
    fn default() -> Self {
        Self {
            newest: features::NEWEST,
            oldest: features::OLDEST,
            token: Token::default(),
            page_bytes: 0,
            vcpus: 0,
            channels: 0,
            ram: Vec::new(),
            blocks: Vec::new(),
            vm_id: String::new(),
            description: Vec::new(),
            features: Vec::new(),
            resume: None,
        }
    }
}

/// The destination is ready to receive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Accept {
    /// The protocol to speak from here on.
    pub version: u16,
    /// TCP port for data connections, of the address that the source reached the destination at.
    pub data_port: u16,
    /// The features that both sides have.
    pub features: Vec<String>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Versions {
    newest: U16,
    oldest: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct VmBody {
    token: Token,
    page_bytes: U32,
    vcpus: U32,
    channels: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RunBody {
    first_page: U64,
    pages: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AcceptBody {
    version: U16,
    data_port: U16,
}

impl From<PageRun> for RunBody {
    fn from(run: PageRun) -> Self {
        Self { first_page: run.first.0.into(), pages: run.pages.into() }
    }
}

impl From<RunBody> for PageRun {
    fn from(run: RunBody) -> Self {
        Self { first: PageIndex(run.first_page.get()), pages: run.pages.get() }
    }
}

impl Hello {
    pub(super) fn body(&self) -> Vec<u8> {
        let versions = Versions { newest: self.newest.into(), oldest: self.oldest.into() };
        let vm = VmBody {
            token: self.token,
            page_bytes: self.page_bytes.into(),
            vcpus: self.vcpus.into(),
            channels: self.channels.into(),
        };
        let ram = self.ram.iter().flat_map(|run| RunBody::from(*run).as_bytes().to_vec()).collect();
        let mut all = vec![
            Part::required(part::VM, vm.as_bytes().to_vec()),
            Part::required(part::RAM, ram),
            Part::required(part::FEATURES, Feature::write(&self.features)),
        ];
        if !self.blocks.is_empty() {
            all.push(Part::required(part::BLOCKS, write_blocks(&self.blocks)));
        }
        if !self.vm_id.is_empty() {
            all.push(Part::optional(part::VM_ID, self.vm_id.as_bytes().to_vec()));
        }
        if !self.description.is_empty() {
            all.push(Part::optional(part::DESCRIPTION, self.description.clone()));
        }
        if let Some(session) = self.resume {
            all.push(Part::required(part::RESUME, session.to_vec()));
        }
        let mut body = versions.as_bytes().to_vec();
        parts::write(&mut body, &all);
        body
    }

    /// Reads a Hello. One of versions that are all foreign is read as far as its versions, which is enough to refuse it
    /// by them.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ControlFormatError> {
        let wrong = || ControlFormatError::Body { message: "Hello", bytes: body.len() };
        let newest = U16::read_from_prefix(body).map_err(|_| wrong())?.0.get();
        if newest < features::OLDEST {
            // Version 1 stated one number and no range.
            return Ok(Self { newest, oldest: newest, ..Self::default() });
        }
        let (versions, rest) = Versions::read_from_prefix(body).map_err(|_| wrong())?;
        let oldest = versions.oldest.get();
        if features::common_version(oldest, newest).is_none() {
            return Ok(Self { newest, oldest, ..Self::default() });
        }
        let mut parts = Parts::read(rest)?;
        let vm =
            parts.take(part::VM).and_then(|bytes| VmBody::read_from_bytes(&bytes).ok()).ok_or_else(wrong)?;
        let ram = parts.take(part::RAM).and_then(|bytes| read_runs(&bytes)).ok_or_else(wrong)?;
        let features =
            parts.take(part::FEATURES).and_then(|bytes| Feature::read(&bytes)).ok_or_else(wrong)?;
        let blocks = parts.take(part::BLOCKS).map_or(Some(Vec::new()), |bytes| read_blocks(&bytes));
        let vm_id = parts.take(part::VM_ID).map_or(Some(String::new()), |bytes| read_id(&bytes));
        let description = parts.take(part::DESCRIPTION).unwrap_or_default();
        let resume = parts.take(part::RESUME).map(|bytes| Token::try_from(bytes.as_slice())).transpose();
        parts.finish()?;
        let hello = Self {
            newest,
            oldest,
            token: vm.token,
            page_bytes: vm.page_bytes.get(),
            vcpus: vm.vcpus.get(),
            channels: vm.channels.get(),
            ram,
            blocks: blocks.ok_or_else(wrong)?,
            vm_id: vm_id.ok_or_else(wrong)?,
            description,
            features,
            resume: resume.map_err(|_| wrong())?,
        };
        (hello.description.len() <= MAX_DESCRIPTION_BYTES).then_some(hello).ok_or_else(wrong)
    }
}

fn read_runs(bytes: &[u8]) -> Option<Vec<PageRun>> {
    let runs = <[RunBody]>::ref_from_bytes(bytes).ok()?;
    (runs.len() <= MAX_REGIONS).then(|| runs.iter().map(|run| PageRun::from(*run)).collect())
}

/// Each block is a part, by its name.
fn write_blocks(blocks: &[Block]) -> Vec<u8> {
    let part = |block: &Block| Part::required(&block.name, RunBody::from(block.pages).as_bytes().to_vec());
    let mut bytes = Vec::new();
    parts::write(&mut bytes, &blocks.iter().map(part).collect::<Vec<_>>());
    bytes
}

fn read_blocks(bytes: &[u8]) -> Option<Vec<Block>> {
    let parts = parts::read(bytes).ok().filter(|parts| parts.len() <= MAX_BLOCKS)?;
    let block = |part: Part| {
        let run = RunBody::read_from_bytes(&part.bytes).ok()?;
        Some(Block { name: part.name, pages: run.into() })
    };
    parts.into_iter().map(block).collect()
}

fn read_id(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).ok().filter(|id| is_name(id)).map(str::to_owned)
}

impl Accept {
    pub(super) fn body(&self) -> Vec<u8> {
        let fixed = AcceptBody { version: self.version.into(), data_port: self.data_port.into() };
        let agreed = |name: &String| Feature { name: name.clone(), required: false };
        let features = Feature::write(&self.features.iter().map(agreed).collect::<Vec<_>>());
        let mut body = fixed.as_bytes().to_vec();
        parts::write(&mut body, &[Part::required(part::FEATURES, features)]);
        body
    }

    pub(super) fn parse(body: &[u8]) -> Result<Self, ControlFormatError> {
        let wrong = || ControlFormatError::Body { message: "Accept", bytes: body.len() };
        let (fixed, rest) = AcceptBody::read_from_prefix(body).map_err(|_| wrong())?;
        let mut parts = Parts::read(rest)?;
        let features =
            parts.take(part::FEATURES).and_then(|bytes| Feature::read(&bytes)).ok_or_else(wrong)?;
        parts.finish()?;
        Ok(Self {
            version: fixed.version.get(),
            data_port: fixed.data_port.get(),
            features: features.into_iter().map(|feature| feature.name).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_of_a_later_release_is_read_if_it_speaks_this_version_too() {
        let hello = Hello { newest: features::NEWEST + 1, ..Hello::default() };
        assert_eq!(Hello::parse(&hello.body()).unwrap(), hello);
    }

    #[test]
    fn a_hello_of_foreign_versions_is_read_far_enough_to_name_them() {
        for (newest, oldest) in [(1, 1), (9, 8)] {
            let mut body = Versions { newest: newest.into(), oldest: oldest.into() }.as_bytes().to_vec();
            body.extend_from_slice(b"whatever that version says");
            let read = Hello::parse(&body).unwrap();
            assert_eq!((read.newest, read.oldest), (newest, oldest));
        }
    }

    #[test]
    fn what_a_later_release_adds_is_skipped_or_refused_by_name() {
        let mut body = Hello::default().body();
        parts::write(&mut body, &[Part::optional("numa-hints", vec![7; 100])]);
        assert!(Hello::parse(&body).is_ok());
        parts::write(&mut body, &[Part::required("confidential", vec![7; 100])]);
        let refused = Hello::parse(&body).unwrap_err().to_string();
        assert!(refused.contains("confidential"), "{refused}");
    }

    #[test]
    fn a_name_that_could_not_be_printed_is_refused() {
        let hello = Hello { vm_id: "vm\u{1b}[2J".into(), ..Hello::default() };
        assert!(Hello::parse(&hello.body()).is_err());
    }
}
