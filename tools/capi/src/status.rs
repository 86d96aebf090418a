//! What a call says: a status, and for a failed one a text, which waits in its thread until somebody asks.
#![expect(unsafe_code, reason = "functions are called from C by name")]

use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use ringferry::TrackError;
use ringferry::kvm::KvmError;
use ringferry::offload::OffloadError;

/// What a call says. A negative status is an error, and rf_last_error() has its text; nothing has changed then, unless
/// the function says otherwise. A later minor version of the ABI may add errors: treat an unknown negative one as an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// rf_vcpu_before_run(): do not enter the guest yet; look whether this vCPU is wanted, and call again.
    Interrupted = 1,
    /// rf_session_observe(): this backend does not know what was dirtied before it is harvested.
    Unobservable = 2,
    /// A pointer that must not be NULL is.
    Null = -1,
    /// A handle is of another kind than the function takes, or was freed.
    WrongHandle = -2,
    /// An argument has a value that is not allowed; the text says which.
    Argument = -3,
    /// This kernel lacks what was asked for.
    Unsupported = -4,
    /// The rings must be enabled once, before the first vCPU is created, and large enough for this host.
    TooLate = -5,
    /// The kernel refused for another reason; the text has its answer.
    Kernel = -6,
    /// A slot with this id is tracked already.
    SlotKnown = -7,
    /// No slot with this id is tracked.
    SlotUnknown = -8,
    /// A slot shares guest pages or host memory with another one.
    SlotOverlaps = -9,
    /// KVM does not have the slot, or has it otherwise: read-only, on guest_memfd, of another size or at another address.
    SlotDiffers = -10,
    /// A vCPU with this index is attached already.
    VcpuKnown = -11,
    /// No vCPU is there.
    VcpuUnknown = -12,
    /// The descriptor is no vCPU with a ring that can be mapped, or one of another VM.
    NotVcpu = -13,
    /// A buffer is too small.
    BufferTooSmall = -14,
    /// The ring of a vCPU is out of step with KVM. Nothing was reported clean; stop tracking, and stop the vCPU.
    RingLost = -15,
    /// The header that the VMM was compiled with does not fit this library.
    Abi = -16,
    /// The library has a bug, and caught it. Treat all memory as dirty.
    Internal = -17,
    /// Any other error.
    Other = -18,
    /// The offload process has died, froze, refused, or said what its place does not allow.
    Offload = -19,
    /// Cancelled by rf_cancel_set().
    Cancelled = -20,
    /// A callback of the VMM failed in a way that nothing could be done about: see the function that returns it.
    Callback = -21,
}

/// Why a call failed.
pub(crate) enum Failure {
    /// An argument is NULL: its name.
    Null(&'static str),
    /// An argument is no handle of the right kind: its name.
    WrongHandle(&'static str),
    /// Found by this layer.
    Here(Status, &'static str),
    /// Found here, with a number that belongs into the text.
    With(Status, &'static str, u64),
    /// Found here, of an argument: its name, and what is wrong with it.
    Named(Status, &'static str, &'static str),
    /// Said by somebody else.
    Said(Status, String),
    /// Found by the Rust layer.
    Track(TrackError),
    /// A migration beside the VMM failed.
    Offload(OffloadError),
}

impl From<TrackError> for Failure {
    fn from(error: TrackError) -> Self {
        Self::Track(error)
    }
}

impl From<KvmError> for Failure {
    fn from(error: KvmError) -> Self {
        Self::Track(TrackError::Kvm(error))
    }
}

impl From<OffloadError> for Failure {
    fn from(error: OffloadError) -> Self {
        Self::Offload(error)
    }
}

impl Failure {
    fn status(&self) -> Status {
        match self {
            Self::Null(_) => Status::Null,
            Self::WrongHandle(_) => Status::WrongHandle,
            Self::Here(status, _) | Self::With(status, ..) | Self::Named(status, ..) => *status,
            Self::Said(status, _) => *status,
            Self::Track(error) => of_track_error(error),
            Self::Offload(error) => of_offload_error(error),
        }
    }
}

fn of_track_error(error: &TrackError) -> Status {
    match error {
        TrackError::Kvm(error) => of_kvm_error(error),
        TrackError::SlotKnown(_) => Status::SlotKnown,
        TrackError::SlotUnknown(_) => Status::SlotUnknown,
        TrackError::Layout(_) => Status::SlotOverlaps,
        TrackError::VcpuKnown(_) => Status::VcpuKnown,
        TrackError::VcpuUnknown(_) => Status::VcpuUnknown,
        TrackError::RingLost(_) => Status::RingLost,
        _ => Status::Other,
    }
}

fn of_offload_error(error: &OffloadError) -> Status {
    match error {
        OffloadError::Cancelled => Status::Cancelled,
        OffloadError::Vm { .. } => Status::Callback,
        OffloadError::Track(error) => of_track_error(error),
        OffloadError::NoFile(_)
        | OffloadError::NoVcpu(_)
        | OffloadError::TooLong { .. }
        | OffloadError::Layout(_) => Status::Argument,
        OffloadError::Page(_) | OffloadError::Thread(_) => Status::Kernel,
        _ => Status::Offload,
    }
}

fn of_kvm_error(error: &KvmError) -> Status {
    match error {
        KvmError::RingSize { .. } | KvmError::RingTooLarge { .. } => Status::Argument,
        KvmError::RingUnsupported | KvmError::ManualProtectUnsupported => Status::Unsupported,
        KvmError::RingRefused { .. } | KvmError::BitmapBesideRingRefused => Status::TooLate,
        KvmError::SlotGone(_) | KvmError::SlotDiffers(_) => Status::SlotDiffers,
        KvmError::NotVcpu | KvmError::VcpuOfOtherVm | KvmError::Map(_) => Status::NotVcpu,
        _ => Status::Kernel,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null(name) => write!(f, "{name} is NULL"),
            Self::WrongHandle(name) => {
                write!(f, "{name} is a handle of another kind, or was freed")
            }
            Self::Here(_, text) => f.write_str(text),
            Self::With(_, text, number) => write!(f, "{text}: {number:#x}"),
            Self::Named(_, name, text) => write!(f, "{name} {text}"),
            Self::Said(_, text) => f.write_str(text),
            Self::Track(error) => error.fmt(f),
            Self::Offload(error) => error.fmt(f),
        }
    }
}

/// Bytes of a text, the end mark included: what is longer is cut off.
pub(crate) const TEXT_BYTES: usize = 512;

/// A text in place: a vCPU's thread does not allocate for it.
pub(crate) struct Text {
    pub(crate) bytes: [u8; TEXT_BYTES],
    len: usize,
}

impl Text {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; TEXT_BYTES], len: 0 }
    }

    pub(crate) fn set(&mut self, said: fmt::Arguments<'_>) {
        self.len = 0;
        // It takes every text, and cuts off what is too long.
        let _ = self.write_fmt(said);
        self.bytes[self.len] = 0;
    }
}

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        for part in part.chars().filter(|part| *part != '\0') {
            let mut utf8 = [0; 4];
            let utf8 = part.encode_utf8(&mut utf8).as_bytes();
            let end = self.len + utf8.len();
            if end >= TEXT_BYTES {
                return Ok(());
            }
            self.bytes[self.len..end].copy_from_slice(utf8);
            self.len = end;
        }
        Ok(())
    }
}

thread_local! {
    static LAST_ERROR: RefCell<Text> = const { RefCell::new(Text::new()) };
}

/// Runs the body of a function that C calls. What it returns is the status; a failure leaves its text, and a panic
/// becomes a failure.
pub(crate) fn call(body: impl FnOnce() -> Result<Status, Failure>) -> Status {
    // What a panic leaves half done is behind locks that the Rust layer takes up again without a loss of pages.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(status)) => status,
        Ok(Err(failure)) => {
            keep(format_args!("{failure}"));
            failure.status()
        }
        Err(panic) => {
            let said = panic.downcast_ref::<&str>().copied();
            let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            keep(format_args!("a bug in Ringferry: {}", said.unwrap_or("a panic")));
            // What is dropped here could panic again.
            std::mem::forget(panic);
            Status::Internal
        }
    }
}

/// [`call`] of what has nothing to say but that it is done.
pub(crate) fn done(body: impl FnOnce() -> Result<(), Failure>) -> Status {
    call(|| body().map(|()| Status::Ok))
}

fn keep(said: fmt::Arguments<'_>) {
    // Borrowed by nobody else: nothing here calls out.
    let _ = LAST_ERROR.try_with(|text| text.try_borrow_mut().map(|mut text| text.set(said)));
}

/// The text of the last call that failed on the calling thread: what was tried, what was found, what to do. It has at most
/// 511 bytes of UTF-8, and is "" if none failed.
///
/// The text belongs to the library. It stays as it is until another call fails on this thread, or the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn rf_last_error() -> *const c_char {
    // Constant initialisation and nothing to drop: it is there as long as the thread is.
    LAST_ERROR.with(|text| text.as_ptr().cast_const().cast::<c_char>())
}

/// The name of a status, as "RF_SLOT_UNKNOWN"; "RF_?" for a number that is none. The text is constant.
#[unsafe(no_mangle)]
pub extern "C" fn rf_status_name(status: i32) -> *const c_char {
    let named = STATUSES.iter().find(|(known, _)| *known as i32 == status);
    named.map_or(c"RF_?", |(_, name)| *name).as_ptr()
}

/// Every status and its name.
const STATUSES: &[(Status, &CStr)] = &[
    (Status::Ok, c"RF_OK"),
    (Status::Interrupted, c"RF_INTERRUPTED"),
    (Status::Unobservable, c"RF_UNOBSERVABLE"),
    (Status::Null, c"RF_NULL"),
    (Status::WrongHandle, c"RF_WRONG_HANDLE"),
    (Status::Argument, c"RF_ARGUMENT"),
    (Status::Unsupported, c"RF_UNSUPPORTED"),
    (Status::TooLate, c"RF_TOO_LATE"),
    (Status::Kernel, c"RF_KERNEL"),
    (Status::SlotKnown, c"RF_SLOT_KNOWN"),
    (Status::SlotUnknown, c"RF_SLOT_UNKNOWN"),
    (Status::SlotOverlaps, c"RF_SLOT_OVERLAPS"),
    (Status::SlotDiffers, c"RF_SLOT_DIFFERS"),
    (Status::VcpuKnown, c"RF_VCPU_KNOWN"),
    (Status::VcpuUnknown, c"RF_VCPU_UNKNOWN"),
    (Status::NotVcpu, c"RF_NOT_VCPU"),
    (Status::BufferTooSmall, c"RF_BUFFER_TOO_SMALL"),
    (Status::RingLost, c"RF_RING_LOST"),
    (Status::Abi, c"RF_ABI"),
    (Status::Internal, c"RF_INTERNAL"),
    (Status::Other, c"RF_OTHER"),
    (Status::Offload, c"RF_OFFLOAD"),
    (Status::Cancelled, c"RF_CANCELLED"),
    (Status::Callback, c"RF_CALLBACK"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: the text of this thread, of which nothing else is called meanwhile.
        unsafe { CStr::from_ptr(rf_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_an_error_with_its_text() {
        assert_eq!(done(|| panic!("the {} fell", "sky")), Status::Internal);
        assert_eq!(last_error(), "a bug in Ringferry: the sky fell");
    }

    #[test]
    fn a_text_is_its_threads_own_and_stays_until_the_next_failure() {
        assert_eq!(done(|| Err(Failure::Null("tracker"))), Status::Null);
        assert_eq!(done(|| Ok(())), Status::Ok);
        assert_eq!(last_error(), "tracker is NULL");
        assert_eq!(std::thread::spawn(last_error).join().unwrap(), "");
        assert_eq!(done(|| Err(TrackError::SlotUnknown(ringferry::SlotId(9)).into())), Status::SlotUnknown);
        assert!(last_error().contains("not tracked"));
    }

    #[test]
    fn a_text_that_is_too_long_is_cut_between_two_characters() {
        let mut text = Text::new();
        text.set(format_args!("a{}", "ä".repeat(TEXT_BYTES)));
        let said = CStr::from_bytes_until_nul(&text.bytes).unwrap().to_str().unwrap();
        assert_eq!(said.len(), TEXT_BYTES - 1);
        text.set(format_args!("short"));
        assert_eq!(CStr::from_bytes_until_nul(&text.bytes).unwrap(), c"short");
    }
}
