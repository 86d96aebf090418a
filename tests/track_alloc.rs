//! Nothing allocates on a vCPU's path, whoever else wants the lock.
#![expect(unsafe_code, reason = "an allocator that counts")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up its guest fails")]

mod bare;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::thread;
use std::time::Duration;

use bare::{BareVm, DATA, Exit, Pages, Privilege, Work, kvm};
use ringferry::PageSet;
use ringferry::kvm::RingSize;
use ringferry::track::{BeforeRun, DirtyTracker, GuestMode};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is left to the system's allocator; counting touches a thread-local without destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as our caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as our caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn nothing_allocates_on_the_vcpu_path() {
    let Some(kvm) = kvm() else { return };
    let vm = BareVm::new(&kvm, &[8192]).unwrap();
    let tracker = DirtyTracker::enable(vm.fd(), RingSize::from_entries(1024).unwrap()).unwrap();
    tracker.add_memory(vm.memory()).unwrap();
    let mut vcpu = vm.create_vcpu(0, Privilege::User).unwrap();
    let handle = tracker.attach_vcpu(0, vcpu.fd()).unwrap();
    let throttle = tracker.vcpu(0).unwrap();
    let session = tracker.start().unwrap();
    let ring_fulls = thread::scope(|scope| {
        let handle = &handle;
        let vcpu_thread = scope.spawn(move || {
            let mut ring_fulls = 0;
            // One that nobody handles: it ends no `KVM_RUN`, which is not what this is about.
            handle.time_with(libc::SIGWINCH).unwrap();
            vcpu.set_work(&Work::Loop(Pages { first: DATA, pages: 8192, stride: 1, passes: 20 }), 1).unwrap();
            loop {
                let before = ALLOCATIONS.get();
                while handle.before_run() == BeforeRun::Interrupted {}
                while handle.before_run_in(|| GuestMode::Kernel) == BeforeRun::Interrupted {}
                assert_eq!(ALLOCATIONS.get(), before, "before_run");
                match vcpu.run().unwrap() {
                    Exit::Done => break,
                    Exit::Kicked => {}
                    Exit::RingFull => {
                        let before = ALLOCATIONS.get();
                        handle.ring_full().unwrap();
                        assert_eq!(ALLOCATIONS.get(), before, "ring_full");
                        ring_fulls += 1;
                    }
                }
            }
            ring_fulls
        });
        let mut dirty = PageSet::new(vm.memory().end());
        while !vcpu_thread.is_finished() {
            throttle.close_for(Duration::from_micros(50));
            session.observe().unwrap();
            dirty.clear();
            session.harvest(&mut dirty).unwrap();
            // Long enough for the gate to open in between.
            thread::sleep(Duration::from_micros(100));
        }
        vcpu_thread.join().unwrap()
    });
    let before = ALLOCATIONS.get();
    drop(Box::new(1));
    assert_eq!(ALLOCATIONS.get(), before + 1, "the allocator counts");
    eprintln!("{ring_fulls} full rings");
}
