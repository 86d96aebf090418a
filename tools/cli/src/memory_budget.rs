//! How much RAM the VMs of one `ringferry receive` may have together: a source says how large its VM is, and is believed
//! no further than this.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::doctor::host::meminfo;
use crate::sizes::Size;

/// The RAM that is left for VMs.
#[derive(Debug)]
pub struct MemoryBudget(Mutex<u64>);

/// The RAM of one VM; it is free again with the end of this value.
#[derive(Debug)]
pub struct Reserved<'b> {
    budget: &'b MemoryBudget,
    bytes: u64,
}

impl MemoryBudget {
    /// So much, or what this host has available now.
    pub fn new(most: Option<Size>) -> Self {
        let available = || meminfo("MemAvailable").map_or(u64::MAX, |kib| kib.saturating_mul(1024));
        Self(Mutex::new(most.map_or_else(available, |most| most.bytes)))
    }

    /// Takes `bytes` for a VM, or says what is left.
    pub fn reserve(&self, bytes: u64) -> Result<Reserved<'_>, String> {
        let mut left = self.left();
        match left.checked_sub(bytes) {
            Some(rest) => {
                *left = rest;
                Ok(Reserved { budget: self, bytes })
            }
            None => {
                let (asked, left) = (bytes >> 20, *left >> 20);
                Err(format!(
                    "the VM has {asked} MiB of RAM, and {left} MiB are left for VMs here: start `ringferry receive` \
                     with a larger --memory-max, or on a host with more memory"
                ))
            }
        }
    }

    fn left(&self) -> MutexGuard<'_, u64> {
        // It is assigned as a whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        *self.budget.left() += self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_have_no_more_than_the_budget_together_and_a_vm_that_has_gone_leaves_its_room() {
        let budget = MemoryBudget::new(Some(Size { bytes: 3 << 30 }));
        let first = budget.reserve(2 << 30).unwrap();
        let refused = budget.reserve(2 << 30).unwrap_err();
        assert!(refused.contains("2048 MiB") && refused.contains("1024 MiB are left"), "{refused}");
        let _second = budget.reserve(1 << 30).unwrap();
        assert!(budget.reserve(1).is_err());
        drop(first);
        assert!(budget.reserve(2 << 30).is_ok());
    }

    #[test]
    fn nobody_is_made_to_build_a_vm_that_this_host_has_no_memory_for() {
        assert!(MemoryBudget::new(None).reserve(1 << 60).is_err());
    }
}
