//! Raw system calls, and nothing else: the logic above needs no `unsafe` for them.

#[cfg(feature = "migrate")]
pub(crate) mod tcp;
