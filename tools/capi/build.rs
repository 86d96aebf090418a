//! Names the shared library by the major version of its ABI, so that a VMM is never started with another one.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A test compares it with `RF_ABI_MAJOR`.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libringferry_capi.so.0");
}
