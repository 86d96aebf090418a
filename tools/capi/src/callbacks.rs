//! What a migration asks of a VMM in C, as the Rust layer asks it.
#![expect(unsafe_code, reason = "C gives functions, which are called with its own pointer")]

use std::ffi::{CStr, c_char, c_void};
use std::io::{self, Write};
use std::mem::MaybeUninit;

use ringferry::vm::{Moment, VmError};
use ringferry::{PageIndex, PageRun, PageSet, Paused, Quiesced, Vm};

use crate::set::Run;
use crate::slots::whole_pages;
use crate::state_out::{StateOut, lend_to};
use crate::status::{Failure, Status};

/// What a migration asks of the VMM. Each function is called with `context`, on the thread that called rf_offload_lend() or
/// rf_offload_receive(), one at a time, and never after that call has returned. It may call this library. It returns: no
/// longjmp, no C++ exception leaves it.
///
/// Functions that can fail return NULL when they are done, else a text that says why not, in UTF-8: it is copied at once, and
/// stays the VMM's. Functions that are not needed are NULL.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VmCallbacks {
    /// Whatever the VMM wants to be given.
    pub context: *mut c_void,
    /// Stops every vCPU, and returns once all are outside KVM_RUN, those too that wait in rf_vcpu_before_run(). After a failure
    /// the VM runs. A source needs it.
    pub pause: Option<unsafe extern "C" fn(context: *mut c_void) -> *const c_char>,
    /// Lets every vCPU run, and every device that `quiesce` stopped. After a failure the VM stands still. Both sides need it.
    pub resume: Option<unsafe extern "C" fn(context: *mut c_void) -> *const c_char>,
    /// Forces vCPU `index` out of KVM_RUN soon; it must not block. A source needs it.
    pub kick: Option<unsafe extern "C" fn(context: *mut c_void, index: u32)>,
    /// Writes everything that the guest can observe besides RAM, in the VMM's own format, 64 MiB at most, by rf_state_write().
    /// The guest stands still. It may write guest memory. A source needs it.
    pub save_state: Option<unsafe extern "C" fn(context: *mut c_void, out: *mut StateOut) -> *const c_char>,
    /// Stops every device that writes guest memory, while the vCPUs stand still. NULL: there is none.
    pub quiesce: Option<unsafe extern "C" fn(context: *mut c_void) -> *const c_char>,
    /// Writes device state that the destination can load in pieces, before RAM is complete: once a round while the guest runs,
    /// some `bytes` at a time; and a last time, all the rest, with `stopped`. NULL: there is none.
    pub save_device_state: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            stopped: bool,
            bytes: u64,
            out: *mut StateOut,
        ) -> *const c_char,
    >,
    /// How many bytes `save_device_state` would write if the guest were stopped now. NULL: 0.
    pub device_state_bytes_left: Option<unsafe extern "C" fn(context: *mut c_void) -> u64>,
    /// Pages whose content the guest has given up (balloon, free page reporting), and which are not sent unless they are dirtied
    /// later. It writes up to `capacity` runs at and after the guest physical address `from` to `runs`, in ascending order,
    /// and returns their number. It is called again, from the end of the last run on, as long as it returns `capacity`.
    /// NULL: there are none.
    pub discarded_pages: Option<
        unsafe extern "C" fn(context: *mut c_void, from: u64, runs: *mut Run, capacity: usize) -> usize,
    >,
    /// The guest stands still, and from here on it may run at the destination, whatever becomes of this process. NULL: the VMM
    /// need not know. After a failure the VM stays here.
    pub hand_over: Option<unsafe extern "C" fn(context: *mut c_void) -> *const c_char>,
    /// At the destination, where RAM is in place: the inverse of `save_state`. A destination needs it.
    pub restore_state:
        Option<unsafe extern "C" fn(context: *mut c_void, state: *const u8, bytes: usize) -> *const c_char>,
    /// At the destination: the next piece of what `save_device_state` wrote, cut at any place. It must not touch guest memory.
    /// NULL: a VM with such state is refused.
    pub load_device_state:
        Option<unsafe extern "C" fn(context: *mut c_void, piece: *const u8, bytes: usize) -> *const c_char>,
    /// At the destination, when the state is restored: takes everything whose taking can fail (locks on images, taps), so that
    /// `resume` has nothing left to fail at. NULL: there is nothing.
    pub prepare: Option<unsafe extern "C" fn(context: *mut c_void) -> *const c_char>,
    /// At the destination: the VM will not run here. Gives back what `prepare` took. NULL: there is nothing.
    pub release: Option<unsafe extern "C" fn(context: *mut c_void)>,
}

/// The longest state of a machine: what a destination holds.
const STATE_BYTES_MAX: usize = 64 << 20;
/// Runs of discarded pages that are asked for at a time.
const RUNS: usize = 64;

/// What the guest does here.
#[derive(Debug)]
enum Standing {
    Runs,
    StandsStill,
    MayRunThere,
}

/// A VM whose VMM is in C.
#[derive(Debug)]
pub(crate) struct CVm {
    vmm: VmCallbacks,
    standing: Standing,
}

// SAFETY: `Vm` demands it; the layer that has the VM calls it on the thread that gave it, and the header says so to C.
unsafe impl Send for CVm {}

impl CVm {
    /// The VM of these callbacks, of which C knows the first `bytes` bytes.
    ///
    /// # Safety
    ///
    /// `vm` is NULL or has `bytes` bytes, and its functions are what the header says.
    pub(crate) unsafe fn new(vm: *const VmCallbacks, bytes: usize) -> Result<Self, Failure> {
        if vm.is_null() {
            return Err(Failure::Null("vm"));
        }
        if bytes > size_of::<VmCallbacks>() {
            let text = "vm has callbacks that this library does not know (sizeof)";
            return Err(Failure::With(Status::Abi, text, bytes as u64));
        }
        let mut vmm = MaybeUninit::<VmCallbacks>::zeroed();
        // SAFETY: not longer than either; what C does not know of stays NULL, which is a value of each field.
        let vmm = unsafe {
            std::ptr::copy_nonoverlapping(vm.cast::<u8>(), vmm.as_mut_ptr().cast::<u8>(), bytes);
            vmm.assume_init()
        };
        Ok(Self { vmm, standing: Standing::Runs })
    }

    /// Refuses a source without what a source needs.
    pub(crate) fn can_send(&self) -> Result<(), Failure> {
        let VmCallbacks { pause, resume, kick, save_state, .. } = &self.vmm;
        needed(pause, "vm->pause")?;
        needed(resume, "vm->resume")?;
        needed(kick, "vm->kick")?;
        needed(save_state, "vm->save_state")
    }

    /// The same for a destination.
    pub(crate) fn can_receive(&self) -> Result<(), Failure> {
        needed(&self.vmm.restore_state, "vm->restore_state")?;
        needed(&self.vmm.resume, "vm->resume")
    }

    pub(crate) fn context(&self) -> *mut c_void {
        self.vmm.context
    }

    fn do_step(
        &self,
        step: Option<unsafe extern "C" fn(*mut c_void) -> *const c_char>,
    ) -> Result<(), VmError> {
        // SAFETY: the promise of `new`.
        step.map_or(Ok(()), |step| unsafe { said(step(self.vmm.context)) })
    }

    fn save(
        &self,
        to: &mut dyn Write,
        save: impl FnOnce(*mut StateOut) -> *const c_char,
    ) -> Result<(), VmError> {
        let (answer, whole) = lend_to(to, save).map_err(|failure| failure.to_string())?;
        // SAFETY: the header demands it of what a callback returns.
        unsafe { said(answer) }?;
        if whole { Ok(()) } else { Err("a part of the state was not taken".into()) }
    }
}

impl Drop for CVm {
    /// A bug of the library's must not leave a guest that stands still and is nobody else's.
    fn drop(&mut self) {
        if std::thread::panicking() && matches!(self.standing, Standing::StandsStill) {
            // What it says is said to nobody: the call ends with RF_INTERNAL.
            let _ = self.do_step(self.vmm.resume);
        }
    }
}

fn needed<F>(callback: &Option<F>, name: &'static str) -> Result<(), Failure> {
    callback.as_ref().map(|_| ()).ok_or(Failure::Null(name))
}

/// What a callback says.
///
/// # Safety
///
/// The pointer is NULL, or a text with an end mark is behind it.
pub(crate) unsafe fn said(text: *const c_char) -> Result<(), VmError> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: not NULL, and the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    Err(text.chars().take(400).collect::<String>().into())
}

/// State in one piece, of a length that a destination takes.
struct Whole(Vec<u8>);

impl Write for Whole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > STATE_BYTES_MAX - self.0.len() {
            return Err(io::Error::other("it is longer than 64 MiB: use save_device_state"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Vm for CVm {
    fn pause(&mut self) -> Result<Paused, VmError> {
        self.do_step(self.vmm.pause)?;
        self.standing = Standing::StandsStill;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn resume(&mut self, _: Paused) -> Result<(), VmError> {
        self.do_step(self.vmm.resume)?;
        self.standing = Standing::Runs;
        Ok(())
    }

    fn save_state(&mut self, _: &Quiesced<'_>) -> Result<Vec<u8>, VmError> {
        let (mut whole, context) = (Whole(Vec::new()), self.vmm.context);
        let save = self.vmm.save_state.ok_or("this VMM saves no state")?;
        // SAFETY: the promise of `new`.
        self.save(&mut whole, |out| unsafe { save(context, out) })?;
        Ok(whole.0)
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<Paused, VmError> {
        let restore = self.vmm.restore_state.ok_or("this VMM restores no state")?;
        // SAFETY: the promise of `new`.
        unsafe { said(restore(self.vmm.context, state.as_ptr(), state.len())) }?;
        Ok(Paused::declare_every_vcpu_is_outside_kvm_run())
    }

    fn kick(&self, index: usize) {
        if let (Some(kick), Ok(index)) = (self.vmm.kick, u32::try_from(index)) {
            // SAFETY: the promise of `new`.
            unsafe { kick(self.vmm.context, index) };
        }
    }

    fn quiesce<'p>(&mut self, paused: &'p Paused) -> Result<Quiesced<'p>, VmError> {
        self.do_step(self.vmm.quiesce)?;
        Ok(Quiesced::declare_no_device_writes(paused))
    }

    fn save_device_state(&mut self, moment: Moment<'_>, out: &mut dyn Write) -> Result<(), VmError> {
        let Some(save) = self.vmm.save_device_state else { return Ok(()) };
        let context = self.vmm.context;
        let (stopped, bytes) = match moment {
            Moment::Running { bytes } => (false, bytes),
            Moment::Stopped(_) => (true, u64::MAX),
        };
        // SAFETY: the promise of `new`.
        self.save(out, |out| unsafe { save(context, stopped, bytes, out) })
    }

    fn device_state_bytes_left(&mut self) -> u64 {
        // SAFETY: the promise of `new`.
        self.vmm.device_state_bytes_left.map_or(0, |left| unsafe { left(self.vmm.context) })
    }

    fn load_device_state(&mut self, piece: &[u8]) -> Result<(), VmError> {
        let load = self.vmm.load_device_state;
        let load = load.ok_or("this VMM has no device whose state comes in pieces")?;
        // SAFETY: the promise of `new`.
        unsafe { said(load(self.vmm.context, piece.as_ptr(), piece.len())) }
    }

    fn discarded_pages(&mut self, discarded: &mut PageSet) {
        let Some(discarded_pages) = self.vmm.discarded_pages else { return };
        let (mut from, end) = (0, discarded.capacity());
        loop {
            let mut runs = [Run { guest_address: 0, bytes: 0 }; RUNS];
            // SAFETY: the promise of `new`; the array has so many elements.
            let count = unsafe { discarded_pages(self.vmm.context, from, runs.as_mut_ptr(), RUNS) };
            let before = from;
            for run in runs.iter().take(count) {
                // What is no run of whole pages, or begins before the one before it, is not discarded: it is sent.
                let Ok(pages) = whole_pages(run.guest_address, run.bytes) else { return };
                if run.guest_address < from {
                    return;
                }
                discarded.insert_run(below(pages, end));
                from = run.guest_address.saturating_add(run.bytes);
            }
            if count < RUNS || from == before {
                return;
            }
        }
    }

    fn hand_over(&mut self) -> Result<(), VmError> {
        self.do_step(self.vmm.hand_over)?;
        self.standing = Standing::MayRunThere;
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), VmError> {
        self.do_step(self.vmm.prepare)
    }

    fn release(&mut self) {
        if let Some(release) = self.vmm.release {
            // SAFETY: the promise of `new`.
            unsafe { release(self.vmm.context) };
        }
    }
}

/// The part of a run that lies below `end`.
fn below(run: PageRun, end: PageIndex) -> PageRun {
    PageRun { first: run.first.min(end), pages: run.pages.min(end.0.saturating_sub(run.first.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_out::rf_state_write;
    use ringferry::PAGE_SIZE;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    const NOTHING: VmCallbacks = VmCallbacks {
        context: std::ptr::null_mut(),
        pause: None,
        resume: None,
        kick: None,
        save_state: None,
        quiesce: None,
        save_device_state: None,
        device_state_bytes_left: None,
        discarded_pages: None,
        hand_over: None,
        restore_state: None,
        load_device_state: None,
        prepare: None,
        release: None,
    };

    /// A VM whose context counts.
    fn vm(context: &mut u64, vmm: VmCallbacks) -> CVm {
        let vmm = VmCallbacks { context: (&raw mut *context).cast(), ..vmm };
        // SAFETY: of this length, and the functions take what they are given.
        unsafe { CVm::new(&raw const vmm, size_of::<VmCallbacks>()) }
            .map_err(|failure| failure.to_string())
            .unwrap()
    }

    unsafe extern "C" fn count(context: *mut c_void) -> *const c_char {
        // SAFETY: the tests give a number that nobody else uses meanwhile.
        unsafe { *context.cast::<u64>() += 1 };
        std::ptr::null()
    }

    /// Every second page of 100, however many are asked for at a time.
    unsafe extern "C" fn every_second(
        context: *mut c_void,
        from: u64,
        runs: *mut Run,
        capacity: usize,
    ) -> usize {
        // SAFETY: as for `count`.
        unsafe { count(context) };
        let page = PAGE_SIZE as u64;
        let all = (0..100).map(|nth| Run { guest_address: 2 * nth * page, bytes: page });
        let some = all.filter(|run| run.guest_address >= from).take(capacity);
        // SAFETY: the array has `capacity` elements.
        some.enumerate().map(|(at, run)| unsafe { runs.add(at).write(run) }).count()
    }

    #[test]
    fn discarded_pages_are_asked_for_until_there_are_no_more_and_those_beyond_ram_do_not_count() {
        let (mut asked, mut discarded) = (0, PageSet::new(PageIndex(151)));
        vm(&mut asked, VmCallbacks { discarded_pages: Some(every_second), ..NOTHING })
            .discarded_pages(&mut discarded);
        assert_eq!((asked, discarded.len()), (2, 76));
        assert!(discarded.contains(PageIndex(150)) && !discarded.contains(PageIndex(149)));
    }

    unsafe extern "C" fn the_same_again(_: *mut c_void, _: u64, runs: *mut Run, capacity: usize) -> usize {
        for at in 0..capacity {
            // SAFETY: the array has `capacity` elements.
            unsafe { runs.add(at).write(Run { guest_address: 4096, bytes: 4096 }) };
        }
        usize::MAX
    }

    #[test]
    fn a_vmm_that_names_the_same_discarded_page_for_ever_is_asked_no_more() {
        let (mut context, mut discarded) = (0, PageSet::new(PageIndex(16)));
        vm(&mut context, VmCallbacks { discarded_pages: Some(the_same_again), ..NOTHING })
            .discarded_pages(&mut discarded);
        assert_eq!(discarded.len(), 1);
    }

    unsafe extern "C" fn write_and_say_yes(
        _: *mut c_void,
        _: bool,
        bytes: u64,
        out: *mut StateOut,
    ) -> *const c_char {
        let state = bytes.to_le_bytes();
        // SAFETY: the handle of this call, and an array.
        unsafe { rf_state_write(out.cast_const(), state.as_ptr().cast(), state.len()) };
        std::ptr::null()
    }

    #[test]
    fn device_state_reaches_its_writer_and_a_part_that_is_not_taken_is_an_error_whatever_the_vmm_says() {
        let mut context = 0;
        let mut vm = vm(&mut context, VmCallbacks { save_device_state: Some(write_and_say_yes), ..NOTHING });
        let mut taken = Vec::new();
        vm.save_device_state(Moment::Running { bytes: 7 }, &mut taken).unwrap();
        assert_eq!(taken, 7_u64.to_le_bytes());
        let mut full = [0_u8; 4];
        let refused = vm.save_device_state(Moment::Running { bytes: 7 }, &mut &mut full[..]);
        assert!(refused.unwrap_err().to_string().contains("not taken"));
    }

    #[test]
    fn a_state_that_no_destination_takes_is_refused_where_it_is_written() {
        let mut whole = Whole(vec![0; STATE_BYTES_MAX - 1]);
        whole.write_all(&[0]).unwrap();
        assert!(whole.write_all(&[0]).is_err());
    }

    #[test]
    fn a_bug_of_the_librarys_lets_the_guest_run_again_unless_it_was_handed_over() {
        for (hands_over, resumed) in [(false, 1), (true, 0)] {
            let mut context = 0;
            let mut vm = vm(&mut context, VmCallbacks { resume: Some(count), ..NOTHING });
            let fell = catch_unwind(AssertUnwindSafe(move || {
                let _paused = vm.pause().unwrap();
                if hands_over {
                    vm.hand_over().unwrap();
                }
                panic!("the sky fell");
            }));
            assert!(fell.is_err());
            assert_eq!(context, resumed);
        }
    }
}
