//! Named parts: how a control message grows without a break.
//!
//! Behind its fixed fields every message may carry parts, each with a name, a length and a flag that says whether the
//! receiver has to understand it. A receiver skips an optional part that it does not know, and refuses a required one
//! by its name. So a later version adds parts to the messages of this one, and both sides find out by themselves what
//! that means.

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::ControlFormatError;

/// Longest name of a part or a feature: printable ASCII.
pub const MAX_NAME_BYTES: usize = 64;
/// Parts in one message, at most.
pub const MAX_PARTS: usize = 256;

/// The receiver must understand the part, or refuse the message.
const REQUIRED: u8 = 1;

/// Precedes a part: then come its name and its bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct PartHead {
    name_bytes: u8,
    flags: u8,
    reserved: [u8; 2],
    bytes: U32,
}

/// One part of a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// What it is.
    pub name: String,
    /// Whether a receiver that does not know it must refuse the message.
    pub required: bool,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl Part {
    /// A part that the receiver has to understand.
    pub fn required(name: &str, bytes: Vec<u8>) -> Self {
        Self { name: name.to_owned(), required: true, bytes }
    }

    /// A part that the receiver may skip.
    pub fn optional(name: &str, bytes: Vec<u8>) -> Self {
        Self { name: name.to_owned(), required: false, bytes }
    }
}

/// Appends `parts` to the fixed fields of a message.
pub fn write(out: &mut Vec<u8>, parts: &[Part]) {
    for part in parts {
        let name = &part.name.as_bytes()[..part.name.len().min(MAX_NAME_BYTES)];
        let head = PartHead {
            name_bytes: u8::try_from(name.len()).unwrap_or(u8::MAX),
            flags: u8::from(part.required) * REQUIRED,
            reserved: [0; 2],
            bytes: u32::try_from(part.bytes.len()).unwrap_or(u32::MAX).into(),
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(name);
        out.extend_from_slice(&part.bytes);
    }
}

/// Reads parts to the end of `rest`. The message's limit bounds what they can hold.
///
/// # Errors
///
/// [`ControlFormatError::Part`] for a part that its own head does not describe, an illegal name, or too many parts.
pub fn read(mut rest: &[u8]) -> Result<Vec<Part>, ControlFormatError> {
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let found = read_one(rest).filter(|_| parts.len() < MAX_PARTS);
        let (part, after) = found.ok_or(ControlFormatError::Part { number: parts.len() })?;
        parts.push(part);
        rest = after;
    }
    Ok(parts)
}

fn read_one(bytes: &[u8]) -> Option<(Part, &[u8])> {
    let (head, rest) = PartHead::read_from_prefix(bytes).ok()?;
    let (name, rest) = rest.split_at_checked(usize::from(head.name_bytes))?;
    let (content, rest) = rest.split_at_checked(usize::try_from(head.bytes.get()).ok()?)?;
    let name = std::str::from_utf8(name).ok().filter(|name| is_name(name))?;
    let required = head.flags & REQUIRED != 0;
    Some((Part { name: name.to_owned(), required, bytes: content.to_vec() }, rest))
}

/// Whether `name` can name a part, a feature or a VM's block of memory: it is printed in refusals.
pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The parts of one message, taken out by name; what is left over at the end is unknown here.
#[derive(Debug)]
pub struct Parts(Vec<Part>);

impl Parts {
    /// Reads the parts behind a message's fixed fields.
    ///
    /// # Errors
    ///
    /// As [`read`].
    pub fn read(rest: &[u8]) -> Result<Self, ControlFormatError> {
        read(rest).map(Self)
    }

    /// Takes the part of this name out; the first, if there are several.
    pub fn take(&mut self, name: &str) -> Option<Vec<u8>> {
        let at = self.0.iter().position(|part| part.name == name)?;
        Some(self.0.remove(at).bytes)
    }

    /// Every part that this side knows has been taken out: what is left may be skipped, unless it is required.
    ///
    /// # Errors
    ///
    /// [`ControlFormatError::UnknownPart`] names the first required part that is left.
    pub fn finish(self) -> Result<(), ControlFormatError> {
        match self.0.into_iter().find(|part| part.required) {
            Some(part) => Err(ControlFormatError::UnknownPart { name: part.name }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_part() -> impl Strategy<Value = Part> {
        ("[!-~]{1,20}", any::<bool>(), prop::collection::vec(any::<u8>(), 0..50))
            .prop_map(|(name, required, bytes)| Part { name, required, bytes })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(parts in prop::collection::vec(any_part(), 0..10)) {
            let mut bytes = Vec::new();
            write(&mut bytes, &parts);
            prop_assert_eq!(read(&bytes).unwrap(), parts);
        }

        #[test]
        fn random_bytes_give_parts_within_the_input_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(parts) = read(&bytes) {
                let held: usize = parts.iter().map(|part| part.name.len() + part.bytes.len()).sum();
                prop_assert!(held <= bytes.len());
            }
        }
    }

    #[test]
    fn an_unknown_optional_part_is_skipped_and_an_unknown_required_one_refused_by_name() {
        let mut bytes = Vec::new();
        write(&mut bytes, &[Part::required("known", vec![1]), Part::optional("later", vec![2])]);
        let mut parts = Parts::read(&bytes).unwrap();
        assert_eq!(parts.take("known"), Some(vec![1]));
        assert_eq!(parts.finish(), Ok(()));
        write(&mut bytes, &[Part::required("much-later", vec![3])]);
        let mut parts = Parts::read(&bytes).unwrap();
        parts.take("known");
        let name = "much-later".to_owned();
        assert_eq!(parts.finish(), Err(ControlFormatError::UnknownPart { name }));
    }

    #[test]
    fn more_parts_than_a_message_may_have_are_refused() {
        let mut bytes = Vec::new();
        write(&mut bytes, &vec![Part::optional("x", Vec::new()); MAX_PARTS + 1]);
        assert_eq!(read(&bytes), Err(ControlFormatError::Part { number: MAX_PARTS }));
    }
}
