//! What the running kernel's types look like: a reader of BTF that answers two questions, how many arguments a
//! tracepoint has and what kind of thing a struct member is.
//!
//! libbpf relocates the programs by the same information, but only after we asked it to load them, and it cannot be
//! asked about a module. `preflight` asks here first, so that a refusal names the field. The format is that of
//! Documentation/bpf/btf.rst; a module's BTF continues the numbering of vmlinux, both of types and of strings.

use std::collections::HashMap;
use std::path::Path;
use std::{fs, io};

use crate::Error;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const KVM_MODULE: &str = "/sys/kernel/btf/kvm";

const MAGIC: u16 = 0xeb9f;

/// Kinds of BTF types, by their numbers in the format.
mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FWD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// What a struct member is, as far as the programs care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberKind {
    /// An integer or an enumeration.
    Number,
    /// A pointer.
    Pointer,
    /// A struct or union that lies inside.
    Embedded,
    /// An array.
    Array,
    /// Anything else.
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Type {
    /// Offset in `strings`.
    name: usize,
    kind: u32,
    /// Members or arguments.
    count: usize,
    /// Where what follows the common header starts in `bytes`.
    details: usize,
    /// The type referred to, for kinds that refer to one.
    target: usize,
}

/// The types of the running kernel and, if KVM is a module, of that module.
#[derive(Debug, Default)]
pub struct KernelTypes {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    types: Vec<Type>,
    structs: HashMap<String, usize>,
    typedefs: HashMap<String, usize>,
}

impl KernelTypes {
    /// Reads the running kernel's types from `/sys/kernel/btf`.
    ///
    /// # Errors
    ///
    /// [`Error::NoTypes`] if a file is missing or is not BTF.
    pub fn of_running_kernel() -> Result<Self, Error> {
        let mut types = Self::default();
        let mut add = |path: &str| {
            let no_types = |error| Error::NoTypes { path: path.to_owned(), error };
            types.add(&fs::read(path).map_err(no_types)?).map_err(no_types)
        };
        add(VMLINUX)?;
        if Path::new(KVM_MODULE).exists() {
            add(KVM_MODULE)?;
        }
        Ok(types)
    }

    /// Adds one BTF blob; the second and later ones continue the numbering of the first, as those of modules do.
    ///
    /// # Errors
    ///
    /// `InvalidData` if the blob is cut short or holds a kind that this reader does not know.
    pub fn add(&mut self, blob: &[u8]) -> io::Result<()> {
        let header = Header::parse(blob).ok_or_else(|| invalid("no BTF header"))?;
        let bytes =
            blob.get(header.types.clone()).ok_or_else(|| invalid("the types end before their length"))?;
        let strings =
            blob.get(header.strings).ok_or_else(|| invalid("the strings end before their length"))?;
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.strings.extend_from_slice(strings);
        if self.types.is_empty() {
            // Type 0 is void, and takes no space.
            self.types.push(Type { name: 0, kind: 0, count: 0, details: 0, target: 0 });
        }
        let mut at = start;
        while at < self.bytes.len() {
            let read =
                self.type_at(at).ok_or_else(|| invalid("a type is cut short, or of an unknown kind"))?;
            at =
                read.details + details_bytes(read.kind, read.count).ok_or_else(|| invalid("unknown kind"))?;
            let id = self.types.len();
            self.types.push(read);
            let index = match read.kind {
                kind::STRUCT => &mut self.structs,
                kind::TYPEDEF => &mut self.typedefs,
                _ => continue,
            };
            if let Some(name) = string_at(&self.strings, read.name) {
                // The first of a name wins: vmlinux before modules, as libbpf prefers it.
                index.entry(name.to_owned()).or_insert(id);
            }
        }
        Ok(())
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        let info = self.u32_at(at + 4)?;
        Some(Type {
            name: usize::try_from(self.u32_at(at)?).ok()?,
            kind: info >> 24 & 0x1f,
            count: usize::try_from(info & 0xffff).ok()?,
            details: at + 12,
            target: usize::try_from(self.u32_at(at + 8)?).ok()?,
        })
    }

    fn u32_at(&self, at: usize) -> Option<u32> {
        u32_at(&self.bytes, at)
    }

    /// Arguments of a tracepoint, as a `tp_btf` program sees them; `None` if the kernel has no such tracepoint.
    pub fn tracepoint_arguments(&self, tracepoint: &str) -> Option<usize> {
        let typedef = *self.typedefs.get(&format!("btf_trace_{tracepoint}"))?;
        let pointer = self.types.get(self.types[typedef].target)?;
        let function = self.types.get(pointer.target)?;
        // The first one is the registration's private pointer, which programs do not see.
        (pointer.kind == kind::PTR && function.kind == kind::FUNC_PROTO)
            .then(|| function.count.saturating_sub(1))
    }

    /// What the named member of the named struct is, also inside anonymous ones; `None` if there is no such member.
    pub fn member(&self, record: &str, member: &str) -> Option<MemberKind> {
        self.member_of(*self.structs.get(record)?, member, 4)
    }

    fn member_of(&self, record: usize, member: &str, depth: u32) -> Option<MemberKind> {
        let record = *self.types.get(record)?;
        for index in 0..record.count {
            let at = record.details + index * 12;
            let name = string_at(&self.strings, usize::try_from(self.u32_at(at)?).ok()?)?;
            let target = usize::try_from(self.u32_at(at + 4)?).ok()?;
            let kind = self.member_kind(target);
            if name == member {
                return Some(kind);
            }
            if name.is_empty()
                && kind == MemberKind::Embedded
                && depth > 0
                && let Some(found) = self.member_of(target, member, depth - 1)
            {
                return Some(found);
            }
        }
        None
    }

    fn member_kind(&self, mut id: usize) -> MemberKind {
        // Qualifiers and typedefs; a chain longer than this is not C.
        for _ in 0..32 {
            let Some(found) = self.types.get(id) else { break };
            match found.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = found.target
                }
                kind::INT | kind::ENUM | kind::ENUM64 => return MemberKind::Number,
                kind::PTR => return MemberKind::Pointer,
                kind::STRUCT | kind::UNION => return MemberKind::Embedded,
                kind::ARRAY => return MemberKind::Array,
                _ => break,
            }
        }
        MemberKind::Other
    }
}

struct Header {
    types: std::ops::Range<usize>,
    strings: std::ops::Range<usize>,
}

impl Header {
    fn parse(blob: &[u8]) -> Option<Self> {
        if u16::from_le_bytes([*blob.first()?, *blob.get(1)?]) != MAGIC {
            return None;
        }
        let word = |at| usize::try_from(u32_at(blob, at)?).ok();
        let header = word(4)?;
        let range = |offset: usize, length: usize| {
            let start = header.checked_add(offset)?;
            Some(start..start.checked_add(length)?)
        };
        Some(Self { types: range(word(8)?, word(12)?)?, strings: range(word(16)?, word(20)?)? })
    }
}

/// Bytes after the common header of a type.
fn details_bytes(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * count,
        kind::ENUM | kind::FUNC_PROTO => 8 * count,
        kind::PTR
        | kind::FWD
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | kind::FUNC
        | kind::FLOAT
        | kind::TYPE_TAG => 0,
        _ => return None,
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn string_at(strings: &[u8], at: usize) -> Option<&str> {
    let rest = strings.get(at..)?;
    let end = rest.iter().position(|&byte| byte == 0)?;
    std::str::from_utf8(&rest[..end]).ok()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not BTF as this version knows it: {what}"))
}
