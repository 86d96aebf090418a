//! The policies: who is slowed down so that a migration ends.
//!
//! A policy is a file here: its parameters, as a user sets them, and its `Rule`, which holds what the policy remembers in one
//! migration. One line in the table below makes it known by its name.

mod auto_converge;
mod dirty_limit;
mod fair_share;
mod hold;
mod none;
mod rule;

use std::fmt;
use std::str::FromStr;

pub use auto_converge::AutoConverge;
pub use dirty_limit::DirtyLimit;
pub use fair_share::FairShare;
pub use none::Nobody;

use self::rule::Parameters;
pub(crate) use self::rule::{Braking, Decision, Rule, View};

macro_rules! policies {
    ($($(#[$doc:meta])* $name:literal => $policy:ident($parameters:ty),)+) => {
        /// Who is slowed down so that a migration ends.
        #[derive(Clone, Copy, PartialEq, Debug)]
        #[non_exhaustive]
        pub enum Policy {
            $($(#[$doc])* $policy($parameters),)+
        }

        /// All names, for help texts and error messages.
        pub const POLICY_NAMES: [&str; [$($name),+].len()] = [$($name),+];

        impl Policy {
            /// The name that users know it by.
            pub const fn name(&self) -> &'static str {
                match self {
                    $(Self::$policy(_) => $name,)+
                }
            }

            pub(crate) fn rule(self) -> Box<dyn Rule> {
                match self {
                    $(Self::$policy(parameters) => parameters.rule(),)+
                }
            }
        }

        impl FromStr for Policy {
            type Err = UnknownPolicy;

            /// The policy of this name with its default parameters.
            fn from_str(name: &str) -> Result<Self, Self::Err> {
                match name {
                    $($name => Ok(Self::$policy(<$parameters>::default())),)+
                    _ => Err(UnknownPolicy(name.to_owned())),
                }
            }
        }
    };
}

policies! {
    /// Nobody. A guest that dirties faster than the link drains is not migrated within the downtime limit.
    "none" => None(Nobody),
    /// All vCPUs alike, by a growing share of their time: QEMU's `auto-converge`.
    "auto-converge" => AutoConverge(AutoConverge),
    /// Every vCPU at the same fixed rate of dirtying: QEMU's `dirty-limit`.
    "dirty-limit" => DirtyLimit(DirtyLimit),
    /// Only those vCPUs that dirty more than their share of what the link can take: the default.
    "fair-share" => FairShare(FairShare),
}

impl Default for Policy {
    fn default() -> Self {
        Self::FairShare(FairShare::default())
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A policy that does not exist.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownPolicy(String);

impl fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no policy {:?}; the policies are {}", self.0, POLICY_NAMES.join(", "))
    }
}

impl std::error::Error for UnknownPolicy {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_has_one_name_and_a_wrong_name_is_answered_with_the_right_ones() {
        for name in POLICY_NAMES {
            assert_eq!(name.parse::<Policy>().unwrap().to_string(), name);
        }
        assert_eq!(Policy::default().name(), "fair-share");
        let error = "postpone".parse::<Policy>().unwrap_err().to_string();
        assert!(POLICY_NAMES.iter().all(|name| error.contains(name)), "{error}");
    }
}
