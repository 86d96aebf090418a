//! The kernel's ABI and nothing else: the only ioctls, the only memory shared with KVM.
