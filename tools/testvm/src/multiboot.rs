//! The multiboot-1 format: what an image file says about where it wants to be, and the information a boot
//! loader leaves for it.
//!
//! Everything here computes on byte slices; `boot` puts the result into guest RAM. Source: Multiboot
//! Specification version 0.6.96, sections 3.1 (header), 3.2 (machine state) and 3.3 (boot information).

use std::ops::Range;

/// First word of the header in the image.
const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// What EAX holds when the image starts.
pub const ENTRY_MAGIC: u32 = 0x2BAD_B002;
/// The header lies wholly within this many bytes of the file, 4-byte aligned (section 3.1).
const HEADER_SEARCH_BYTES: usize = 8192;
/// Header flags that a loader must understand or refuse: bits 0 to 15.
const MANDATORY_FLAGS: u32 = 0xffff;
/// Modules on page boundaries (we load none), and memory information (we always give it).
const UNDERSTOOD_FLAGS: u32 = 0b11;
/// The header carries load addresses itself: the "a.out kludge", for files that are not ELF.
const HAS_ADDRESSES: u32 = 1 << 16;
/// More program headers than any sane image has.
const MAX_PROGRAM_HEADERS: usize = 64;

/// Why a file cannot be booted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No header.
    #[error(
        "the image has no multiboot-1 header (magic 0x1badb002 with a right checksum) in its first 8192 bytes; \
         give a multiboot kernel, not a disk image or a bzImage"
    )]
    NoHeader,
    /// The header demands something from the loader.
    #[error("the image demands multiboot features {0:#x} that are not offered (a video mode, most likely)")]
    Unsupported(u32),
    /// The file ends before what its headers describe.
    #[error("the image is cut short: {what} needs bytes {start:#x}..{end:#x}, the file has {file_bytes:#x}")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// An executable, but not for this machine.
    #[error("the image is {0}; multiboot-1 starts 32-bit x86 executables (ELF32, machine 386)")]
    NotI386(&'static str),
    /// Fields of the header contradict each other.
    #[error("the image's header is inconsistent: {0}")]
    Inconsistent(&'static str),
    /// Two segments claim the same memory, or one claims the boot information's.
    #[error("the image's segment at {address:#x} overlaps {other}")]
    Overlap {
        /// Where the later segment begins.
        address: u32,
        /// What it collides with.
        other: &'static str,
    },
    /// A segment outside RAM.
    #[error("the image needs RAM at {start:#x}..{end:#x}, which this VM does not have; give it more memory")]
    OutsideRam {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// The command line does not fit.
    #[error("the command line has {found} bytes; at most {limit} fit, and none may be zero")]
    CommandLine {
        /// Its length.
        found: usize,
        /// The longest that fits.
        limit: usize,
    },
}

/// A piece of the file and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address of the first byte.
    pub address: u32,
    /// The bytes of the file that go there.
    pub file: Range<usize>,
    /// Length in memory, at least that of `file`; the rest is zero.
    pub memory_bytes: u32,
}

impl Segment {
    fn end(&self) -> u64 {
        u64::from(self.address) + u64::from(self.memory_bytes)
    }
}

/// How to load an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadPlan {
    /// Non-empty, in order of address, without overlap.
    pub segments: Vec<Segment>,
    /// Guest physical address of the first instruction.
    pub entry: u32,
}

/// Finds the header and works out what goes where.
///
/// # Errors
///
/// [`ImageError`]: the file is not a multiboot image, or one that we cannot start.
pub fn parse(image: &[u8]) -> Result<LoadPlan, ImageError> {
    let (header, flags) = find_header(image)?;
    let unknown = flags & MANDATORY_FLAGS & !UNDERSTOOD_FLAGS;
    if unknown != 0 {
        return Err(ImageError::Unsupported(unknown));
    }
    let mut plan =
        if flags & HAS_ADDRESSES != 0 { parse_addresses(image, header)? } else { parse_elf(image)? };
    plan.segments.retain(|segment| segment.memory_bytes != 0);
    plan.segments.sort_by_key(|segment| segment.address);
    if plan.segments.is_empty() {
        return Err(ImageError::Inconsistent("nothing is to be loaded"));
    }
    if plan.segments.iter().any(|segment| segment.end() > u64::from(u32::MAX)) {
        return Err(ImageError::Inconsistent("a segment reaches beyond 4 GiB"));
    }
    for pair in plan.segments.windows(2) {
        if pair[0].end() > u64::from(pair[1].address) {
            return Err(ImageError::Overlap { address: pair[1].address, other: "another segment" });
        }
    }
    Ok(plan)
}

/// The header's offset in the file, and its flags.
fn find_header(image: &[u8]) -> Result<(usize, u32), ImageError> {
    let searched = &image[..image.len().min(HEADER_SEARCH_BYTES)];
    for offset in (0..searched.len()).step_by(4) {
        let (Some(magic), Some(flags), Some(checksum)) =
            (le32(searched, offset), le32(searched, offset + 4), le32(searched, offset + 8))
        else {
            break;
        };
        if magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0 {
            return Ok((offset, flags));
        }
    }
    Err(ImageError::NoHeader)
}

fn parse_addresses(image: &[u8], header: usize) -> Result<LoadPlan, ImageError> {
    let field = |index: usize, what| {
        let start = header + 12 + index * 4;
        le32(image, start).ok_or_else(|| truncated(image, what, start as u64, start as u64 + 4))
    };
    let header_address = field(0, "the header's header_addr")?;
    let load_address = field(1, "the header's load_addr")?;
    let load_end = field(2, "the header's load_end_addr")?;
    let bss_end = field(3, "the header's bss_end_addr")?;
    let entry = field(4, "the header's entry_addr")?;

    let into_text = header_address
        .checked_sub(load_address)
        .ok_or(ImageError::Inconsistent("header_addr lies before load_addr"))?;
    let into_text = usize::try_from(into_text).map_err(|_| ImageError::Inconsistent("header_addr"))?;
    let file_start = header
        .checked_sub(into_text)
        .ok_or(ImageError::Inconsistent("load_addr lies before the first byte of the file"))?;
    let file_bytes = match load_end {
        // Zero means: text and data are the rest of the file.
        0 => {
            u32::try_from(image.len() - file_start).map_err(|_| ImageError::Inconsistent("4 GiB or more"))?
        }
        end => end
            .checked_sub(load_address)
            .ok_or(ImageError::Inconsistent("load_end_addr lies before load_addr"))?,
    };
    let memory_bytes = match bss_end {
        0 => file_bytes,
        end => end
            .checked_sub(load_address)
            .filter(|bytes| *bytes >= file_bytes)
            .ok_or(ImageError::Inconsistent("bss_end_addr lies before load_end_addr"))?,
    };
    let file = file_range(image, "the load range", file_start as u64, u64::from(file_bytes))?;
    let segment = Segment { address: load_address, file, memory_bytes };
    if entry < load_address || u64::from(entry) >= segment.end() {
        return Err(ImageError::Inconsistent("entry_addr lies outside the loaded range"));
    }
    Ok(LoadPlan { segments: vec![segment], entry })
}

fn parse_elf(image: &[u8]) -> Result<LoadPlan, ImageError> {
    let header = image.get(..52).ok_or_else(|| truncated(image, "the ELF header", 0, 52))?;
    if &header[..4] != b"\x7fELF" {
        return Err(ImageError::NotI386("neither ELF nor flat with addresses in its header (flag bit 16)"));
    }
    match (header[4], header[5]) {
        (1, 1) => {}
        (2, _) => return Err(ImageError::NotI386("ELF64 without load addresses in its multiboot header")),
        _ => return Err(ImageError::NotI386("a big-endian or malformed ELF file")),
    }
    let half = |offset: usize| u16::from_le_bytes([header[offset], header[offset + 1]]);
    let word = |offset| le32(header, offset).unwrap_or(0);
    if half(18) != 3 {
        return Err(ImageError::NotI386("ELF for another machine"));
    }
    let table = u64::from(word(28));
    let (entry_bytes, count) = (u64::from(half(42)), usize::from(half(44)));
    if count == 0 || count > MAX_PROGRAM_HEADERS || entry_bytes < 32 {
        return Err(ImageError::Inconsistent("not 1 to 64 ELF program headers of at least 32 bytes"));
    }
    let virtual_entry = word(24);
    let mut entry = virtual_entry;
    let mut segments = Vec::with_capacity(count);
    for index in 0..count {
        let at = table + index as u64 * entry_bytes;
        let bytes = &image[file_range(image, "an ELF program header", at, 32)?];
        let word = |index: usize| le32(bytes, index * 4).unwrap_or(0);
        let [kind, offset, virtual_address, address, file_bytes, memory_bytes] =
            [word(0), word(1), word(2), word(3), word(4), word(5)];
        const PT_LOAD: u32 = 1;
        if kind != PT_LOAD {
            continue;
        }
        if memory_bytes < file_bytes {
            return Err(ImageError::Inconsistent("an ELF segment is larger in the file than in memory"));
        }
        // `e_entry` is a virtual address; paging is off when the image starts.
        if let Some(into) = virtual_entry.checked_sub(virtual_address).filter(|into| *into < memory_bytes) {
            entry =
                address.checked_add(into).ok_or(ImageError::Inconsistent("the entry lies beyond 4 GiB"))?;
        }
        let file = file_range(image, "an ELF segment", u64::from(offset), u64::from(file_bytes))?;
        segments.push(Segment { address, file, memory_bytes });
    }
    if !segments.iter().any(|s| (u64::from(s.address)..s.end()).contains(&u64::from(entry))) {
        return Err(ImageError::Inconsistent("the ELF entry point lies outside every segment"));
    }
    Ok(LoadPlan { segments, entry })
}

/// What the memory map says about a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapEntry {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// RAM that the guest may use, or reserved.
    pub usable: bool,
}

/// The boot information (section 3.3) as bytes to be put at guest physical address `at`: the fixed part, then
/// the memory map, then the command line and the loader's name.
pub fn information(at: u32, map: &[MapEntry], command_line: &str) -> Vec<u8> {
    const FIXED_BYTES: u32 = 120;
    const MAP_ENTRY_BYTES: u32 = 24;
    // Bits: 0 mem_lower and mem_upper, 2 command line, 6 memory map, 9 the loader's name.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 6 | 1 << 9;
    let map_bytes = MAP_ENTRY_BYTES * u32::try_from(map.len()).unwrap_or(u32::MAX / MAP_ENTRY_BYTES);
    let map_at = at + FIXED_BYTES;
    let command_line_at = map_at + map_bytes;
    let name_at = command_line_at + u32::try_from(command_line.len()).unwrap_or(0) + 1;

    // In KiB; mem_upper is what follows 1 MiB without a hole.
    let kib_from = |start: u64| {
        let usable = map.iter().find(|entry| entry.usable && entry.start == start);
        u32::try_from(usable.map_or(0, |entry| entry.bytes / 1024)).unwrap_or(u32::MAX)
    };
    let mut words = [0u32; FIXED_BYTES as usize / 4];
    words[0] = FLAGS;
    words[1] = kib_from(0);
    words[2] = kib_from(1 << 20);
    words[4] = command_line_at;
    words[11] = map_bytes;
    words[12] = map_at;
    words[16] = name_at;

    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    for entry in map {
        // The size field does not count itself.
        bytes.extend_from_slice(&(MAP_ENTRY_BYTES - 4).to_le_bytes());
        bytes.extend_from_slice(&entry.start.to_le_bytes());
        bytes.extend_from_slice(&entry.bytes.to_le_bytes());
        bytes.extend_from_slice(&if entry.usable { 1u32 } else { 2 }.to_le_bytes());
    }
    bytes.extend_from_slice(command_line.as_bytes());
    bytes.extend_from_slice(b"\0ringferry-testvm\0");
    bytes
}

fn le32(bytes: &[u8], offset: usize) -> Option<u32> {
    let word = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

fn file_range(image: &[u8], what: &'static str, start: u64, bytes: u64) -> Result<Range<usize>, ImageError> {
    let end = start.saturating_add(bytes);
    match (usize::try_from(start), usize::try_from(end)) {
        (Ok(first), Ok(last)) if last <= image.len() => Ok(first..last),
        _ => Err(truncated(image, what, start, end)),
    }
}

fn truncated(image: &[u8], what: &'static str, start: u64, end: u64) -> ImageError {
    ImageError::Truncated { what, start, end, file_bytes: image.len() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn header(flags: u32) -> [u32; 3] {
        [HEADER_MAGIC, flags, 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags)]
    }

    fn flat(addresses: [u32; 5], body: usize) -> Vec<u8> {
        let mut image = words(&header(HAS_ADDRESSES));
        image.extend(words(&addresses));
        image.resize(image.len() + body, 0x90);
        image
    }

    fn elf(program_headers: &[[u32; 8]], entry: u32) -> Vec<u8> {
        let mut image = vec![0u8; 52];
        image[..6].copy_from_slice(b"\x7fELF\x01\x01");
        image[16] = 2;
        image[18] = 3;
        image[24..28].copy_from_slice(&entry.to_le_bytes());
        image[28..32].copy_from_slice(&52u32.to_le_bytes());
        image[42] = 32;
        image[44] = u8::try_from(program_headers.len()).unwrap();
        image.extend(program_headers.iter().flat_map(|header| words(header)));
        image.extend(words(&header(3)));
        image.resize(4096, 0);
        image
    }

    #[test]
    fn a_flat_image_goes_where_its_header_says() {
        let plan = parse(&flat([0x10_0000, 0x10_0000, 0, 0x11_0000, 0x10_0020], 100)).unwrap();
        let segment = Segment { address: 0x10_0000, file: 0..132, memory_bytes: 0x1_0000 };
        assert_eq!(plan, LoadPlan { segments: vec![segment], entry: 0x10_0020 });
    }

    #[test]
    fn an_elf_image_goes_to_physical_addresses_and_starts_at_the_physical_entry() {
        let load = [1, 0, 0xC010_0000, 0x10_0000, 4096, 8192, 7, 4096];
        let plan = parse(&elf(&[load], 0xC010_0040)).unwrap();
        let segment = Segment { address: 0x10_0000, file: 0..4096, memory_bytes: 8192 };
        assert_eq!(plan, LoadPlan { segments: vec![segment], entry: 0x10_0040 });
    }

    #[test]
    fn images_that_cannot_be_booted_say_why() {
        assert_eq!(parse(b""), Err(ImageError::NoHeader));
        assert_eq!(parse(&[0; 9000]), Err(ImageError::NoHeader));
        assert_eq!(parse(&words(&header(4))), Err(ImageError::Unsupported(4)));
        assert!(matches!(parse(&words(&header(0))), Err(ImageError::Truncated { .. })));
        assert!(matches!(parse(&words(&header(HAS_ADDRESSES))), Err(ImageError::Truncated { .. })));
        let mut neither = words(&header(0));
        neither.resize(100, 0);
        assert!(matches!(parse(&neither), Err(ImageError::NotI386(_))));
        let mut elf64 = elf(&[[1, 0, 0x10_0000, 0x10_0000, 64, 64, 7, 0]], 0x10_0000);
        elf64[4] = 2;
        assert!(matches!(parse(&elf64), Err(ImageError::NotI386(_))));
        let past_the_end = [1, 4000, 0x10_0000, 0x10_0000, 4096, 4096, 7, 0];
        assert!(matches!(parse(&elf(&[past_the_end], 0x10_0000)), Err(ImageError::Truncated { .. })));
        let first = [1, 0, 0x10_0000, 0x10_0000, 64, 4096, 7, 0];
        let second = [1, 0, 0x10_0fff, 0x10_0fff, 64, 64, 7, 0];
        assert!(matches!(
            parse(&elf(&[first, second], 0x10_0000)),
            Err(ImageError::Overlap { address: 0x10_0fff, .. })
        ));
        assert!(matches!(parse(&elf(&[first], 0x20_0000)), Err(ImageError::Inconsistent(_))));
        assert!(matches!(parse(&flat([0x1000, 0x2000, 0, 0, 0x2000], 0)), Err(ImageError::Inconsistent(_))));
    }

    #[test]
    fn the_information_points_at_its_own_parts() {
        let map = [
            MapEntry { start: 0, bytes: 0x9_fc00, usable: true },
            MapEntry { start: 0x9_fc00, bytes: 0x6_0400, usable: false },
            MapEntry { start: 1 << 20, bytes: 63 << 20, usable: true },
        ];
        let bytes = information(0x9000, &map, "guest pattern=zipf");
        let word = |offset| le32(&bytes, offset).unwrap();
        assert_eq!((word(4), word(8)), (639, 63 << 10));
        assert_eq!((word(44), word(48)), (72, 0x9000 + 120));
        let at = usize::try_from(word(16) - 0x9000).unwrap();
        assert!(bytes[at..].starts_with(b"guest pattern=zipf\0ringferry-testvm\0"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn whatever_a_header_says_a_plan_stays_inside_file_and_address_space(
            addresses in any::<[u32; 5]>(), near in any::<bool>(), body in 0usize..300,
            loads in proptest::collection::vec(any::<[u32; 8]>(), 1..8), entry in any::<u32>(),
        ) {
            // Small numbers reach the deep branches, large ones the overflows.
            let squeeze = |word: u32| if near { word % 512 } else { word };
            let images = [
                flat(addresses.map(squeeze), body),
                elf(&loads.iter().map(|load| {
                    let mut load = load.map(squeeze);
                    load[0] %= 2;
                    load
                }).collect::<Vec<_>>(), squeeze(entry)),
            ];
            for image in images {
                let Ok(plan) = parse(&image) else { continue };
                let mut free_from = 0u64;
                for segment in &plan.segments {
                    prop_assert!(u64::from(segment.address) >= free_from);
                    prop_assert!(segment.file.end <= image.len());
                    prop_assert!(segment.file.len() as u64 <= u64::from(segment.memory_bytes));
                    free_from = segment.end();
                    prop_assert!(free_from <= 1 << 32);
                }
            }
        }
    }
}
