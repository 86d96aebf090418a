//! The test guest's image, built from `guest/` by `build.rs`.

use crate::config::Image;

/// The test guest as a multiboot-1 image: for [`TestVm`](crate::TestVm), and for QEMU's `-kernel`. Empty where
/// the host is no x86-64 machine.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.img"));

/// The test guest, for [`Boot::Image`](crate::Boot::Image).
pub fn guest_image() -> Image {
    Image::Bytes { name: "ringferry-guest", bytes: IMAGE }
}
