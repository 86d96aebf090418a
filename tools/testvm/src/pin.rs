//! Keeps a vCPU's thread on one CPU, as hosts that sell whole CPUs do.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps this thread on the CPU with the number `index`, of those that it may use and around again. Where that is refused
/// it runs where it may, and the log says so.
pub(crate) fn to_cpu(index: usize) {
    let pinned = sched_getaffinity(None).and_then(|allowed| {
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        let Some(cpu) = cpus.get(index % cpus.len().max(1)) else { return Ok(()) };
        let mut only = CpuSet::new();
        only.set(*cpu);
        sched_setaffinity(None, &only)
    });
    if let Err(error) = pinned {
        tracing::warn!(vcpu = index, %error, "the vCPU's thread could not be kept on one CPU");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_may_use_one_cpu_and_others_are_not_touched() {
        let before = sched_getaffinity(None).unwrap();
        let pinned = std::thread::spawn(|| {
            to_cpu(5);
            sched_getaffinity(None).unwrap()
        });
        assert_eq!(pinned.join().unwrap().count(), 1);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }
}
