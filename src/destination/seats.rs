//! Seats: how many VMs are received at a time, and which.

use std::sync::Arc;

use parking_lot::Mutex;

/// How many VMs may be received at a time, and which they are.
#[derive(Debug)]
pub(super) struct Seats {
    most: usize,
    taken: Mutex<Vec<(u64, String)>>,
}

/// A seat; it is free again with the end of this value.
#[derive(Debug)]
pub(super) struct Seat {
    seats: Arc<Seats>,
    number: u64,
}

impl Seats {
    /// At least one.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), taken: Mutex::default() }
    }

    /// A seat for the VM of this name, or the names of those that have them all.
    pub fn take(self: &Arc<Self>, vm_id: &str) -> Result<Seat, String> {
        let mut taken = self.taken.lock();
        if taken.len() >= self.most {
            let names: Vec<&str> =
                taken.iter().map(|(_, id)| if id.is_empty() { "a VM without a name" } else { id }).collect();
            return Err(names.join(", "));
        }
        let number = taken.iter().map(|(number, _)| number + 1).max().unwrap_or(0);
        taken.push((number, vm_id.to_owned()));
        Ok(Seat { seats: Arc::clone(self), number })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.taken.lock().retain(|(number, _)| *number != self.number);
    }
}
