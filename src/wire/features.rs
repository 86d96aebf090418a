//! What two releases agree on: the version that both speak, and the features that both have.
//!
//! Each side states a range of versions. A feature is a name, required or optional; the agreed ones are those that both
//! name. A required feature that the other side lacks ends the handshake with a refusal that names it.

use super::parts::{self, Part};

/// The newest protocol that this build speaks, and the oldest that it still does.
pub const NEWEST: u16 = 2;
/// See [`NEWEST`]. A release speaks its own version and the one before it, from version 2 on.
pub const OLDEST: u16 = 2;

/// RAM is digested on both sides and compared before the handing over.
pub const VERIFY: &str = "verify";
/// Device state may come in pieces while the guest runs.
pub const DEVICE_STATE: &str = "device-state";

/// State of the machine that was sent may be declared void: the source may call off a switchover until `Prepare`.
pub const CALL_OFF: &str = "call-off";

/// The features that this build has.
pub const OURS: [&str; 3] = [VERIFY, DEVICE_STATE, CALL_OFF];

/// A feature that one side names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Feature {
    /// Its name.
    pub name: String,
    /// Whether the migration cannot go on without it.
    pub required: bool,
}

impl Feature {
    /// The features of this build, of which those in `required` are needed.
    pub fn ours(required: &[&str]) -> Vec<Self> {
        OURS.iter().map(|name| Self { name: (*name).to_owned(), required: required.contains(name) }).collect()
    }

    pub(super) fn write(features: &[Self]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let part = |feature: &Self| Part {
            name: feature.name.clone(),
            required: feature.required,
            bytes: Vec::new(),
        };
        parts::write(&mut bytes, &features.iter().map(part).collect::<Vec<_>>());
        bytes
    }

    pub(super) fn read(bytes: &[u8]) -> Option<Vec<Self>> {
        let parts = parts::read(bytes).ok()?;
        Some(parts.into_iter().map(|part| Self { name: part.name, required: part.required }).collect())
    }
}

/// The features that both sides have.
///
/// # Errors
///
/// The name of the first feature that one side requires and the other lacks.
pub fn agree(ours: &[Feature], theirs: &[Feature]) -> Result<Vec<String>, String> {
    let has = |side: &[Feature], name: &str| side.iter().any(|feature| feature.name == name);
    let lacking = |needs: &[Feature], other: &[Feature]| {
        needs.iter().find(|feature| feature.required && !has(other, &feature.name)).cloned()
    };
    if let Some(missing) = lacking(theirs, ours).or_else(|| lacking(ours, theirs)) {
        return Err(missing.name);
    }
    Ok(ours.iter().filter(|feature| has(theirs, &feature.name)).map(|feature| feature.name.clone()).collect())
}

/// The version to speak with a peer that speaks `oldest..=newest`: the newest that both know; `None` if there is none.
pub fn common_version(oldest: u16, newest: u16) -> Option<u16> {
    let version = newest.min(NEWEST);
    (version >= oldest.max(OLDEST)).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(names: &[(&str, bool)]) -> Vec<Feature> {
        names
            .iter()
            .map(|(name, required)| Feature { name: (*name).to_owned(), required: *required })
            .collect()
    }

    #[test]
    fn what_both_have_is_agreed_and_what_one_needs_and_the_other_lacks_is_named() {
        let ours = features(&[("a", false), ("b", true)]);
        assert_eq!(agree(&ours, &features(&[("b", false), ("later", false)])), Ok(vec!["b".to_owned()]));
        assert_eq!(agree(&ours, &features(&[("b", false), ("later", true)])), Err("later".to_owned()));
        assert_eq!(agree(&ours, &features(&[("a", true)])), Err("b".to_owned()));
    }

    #[test]
    fn the_newest_version_that_both_know_is_spoken() {
        assert_eq!(common_version(NEWEST, NEWEST + 1), Some(NEWEST));
        assert_eq!(common_version(OLDEST, OLDEST), Some(OLDEST));
        assert_eq!(common_version(NEWEST + 1, NEWEST + 3), None);
        assert_eq!(common_version(0, OLDEST - 1), None);
    }
}
