//! Guest RAM as vm-memory maps it: no `unsafe` for the VMM, as vm-memory's types vouch for what [`GuestMemory::new`] demands.
#![expect(unsafe_code, reason = "regions are given by address")]

use std::sync::Arc;

use super::{GuestAddress, GuestMemory, LayoutError, Region, SlotId};

macro_rules! from_vm_memory {
    ($name:ident, $vm_memory:ident, $feature:literal, $GuestMemory:ident) => {
        #[cfg(feature = $feature)]
        impl GuestMemory {
            /// The regions of `memory`, which stays mapped as long as the value and its clones live. Region `n` in
            /// guest-physical order is the slot that `slot_of` says.
            ///
            /// # Errors
            ///
            /// [`LayoutError`] names the first region that cannot be RAM.
            pub fn $name<B>(
                memory: Arc<$vm_memory::GuestMemoryMmap<B>>,
                slot_of: impl Fn(usize) -> SlotId,
            ) -> Result<Self, LayoutError>
            where
                B: $vm_memory::bitmap::Bitmap + Send + Sync + 'static,
            {
                use $vm_memory::{GuestMemoryRegion as _, $GuestMemory as _};
                const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
                let region = |(index, region): (usize, &$vm_memory::GuestRegionMmap<B>)| {
                    let slot = slot_of(index);
                    if region.prot() & READ_WRITE != READ_WRITE {
                        return Err(LayoutError::NotWritable(slot));
                    }
                    let address = GuestAddress(region.start_addr().0);
                    Region::from_bytes(slot, address, region.len(), region.as_ptr())
                };
                let regions = memory.iter().enumerate().map(region).collect::<Result<_, _>>()?;
                // SAFETY:
                // * vm-memory has mapped each region with these rights and this length, and keeps it mapped as long as
                //   `memory` lives, which the value keeps.
                // * It hands out volatile access only, never references.
                let guest = unsafe { Self::new(regions) }?;
                Ok(guest.kept_by(memory))
            }
        }
    };
}

from_vm_memory!(from_vm_memory_0_16, vm_memory_0_16, "vm-memory-0-16", GuestMemory);
from_vm_memory!(from_vm_memory_0_17, vm_memory_0_17, "vm-memory-0-17", GuestMemory);
from_vm_memory!(from_vm_memory_0_18, vm_memory_0_18, "vm-memory-0-18", GuestMemoryBackend);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{PageIndex, PageRun};

    macro_rules! test {
        ($test:ident, $name:ident, $vm_memory:ident, $feature:literal) => {
            #[cfg(feature = $feature)]
            #[test]
            fn $test() {
                use $vm_memory::{GuestAddress, GuestMemoryMmap};
                let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 16)];
                let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&ranges).unwrap();
                let slot_of = |index| SlotId(u32::try_from(index).unwrap() + 3);
                let layout = GuestMemory::$name(Arc::new(memory), slot_of).unwrap();
                let regions: Vec<_> =
                    layout.regions().iter().map(|region| (region.slot, region.pages)).collect();
                let run = |first, pages| PageRun { first: PageIndex(first), pages };
                assert_eq!(regions, [(SlotId(3), run(0, 256)), (SlotId(4), run(1 << 20, 16))]);
                let odd: GuestMemoryMmap<()> =
                    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 5000)]).unwrap();
                let refused = GuestMemory::$name(Arc::new(odd), |_| SlotId(9));
                assert_eq!(refused.err(), Some(LayoutError::Unaligned(SlotId(9))));
            }
        };
    }

    test!(memory_of_vm_memory_0_16_is_guest_ram, from_vm_memory_0_16, vm_memory_0_16, "vm-memory-0-16");
    test!(memory_of_vm_memory_0_17_is_guest_ram, from_vm_memory_0_17, vm_memory_0_17, "vm-memory-0-17");
    test!(memory_of_vm_memory_0_18_is_guest_ram, from_vm_memory_0_18, vm_memory_0_18, "vm-memory-0-18");
}
