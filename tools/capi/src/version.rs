//! Versions: of the library, and of what the header promises.
#![expect(unsafe_code, reason = "functions are called from C by name")]

use std::ffi::c_char;

use crate::status::{Failure, Status, done};

/// The version of the ABI that this header describes, by the rules of semver.org: with the major version changes what compiled
/// VMMs rely on, with the minor version something is added. While the major version is 0, the minor one takes its place.
pub const RF_ABI_MAJOR: u32 = 0;
/// See RF_ABI_MAJOR.
pub const RF_ABI_MINOR: u32 = 1;
/// See RF_ABI_MAJOR.
pub const RF_ABI_PATCH: u32 = 0;

/// The version of the library, as "0.1.0". The text is constant.
#[unsafe(no_mangle)]
pub extern "C" fn rf_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Whether the library has what a VMM was compiled for. Call it first: `rf_check_abi(RF_ABI_MAJOR, RF_ABI_MINOR)`. RF_ABI if
/// not.
#[unsafe(no_mangle)]
pub extern "C" fn rf_check_abi(major: u32, minor: u32) -> Status {
    done(|| {
        let fits = match RF_ABI_MAJOR {
            0 => major == 0 && minor == RF_ABI_MINOR,
            _ => major == RF_ABI_MAJOR && minor <= RF_ABI_MINOR,
        };
        if fits {
            return Ok(());
        }
        let text = "the VMM was compiled with the header of another version of the ABI (major << 16 | minor); compile it anew";
        Err(Failure::With(Status::Abi, text, u64::from(major) << 16 | u64::from(minor)))
    })
}
