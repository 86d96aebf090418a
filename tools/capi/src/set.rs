//! A set of guest pages, as C holds it: it grows with guest RAM by itself.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use parking_lot::Mutex;
use ringferry::{PAGE_SIZE, PageIndex, PageRun, PageSet, RAM_END_MAX};

use crate::handle::{Handle, array, borrow, give, out, take_back};
use crate::status::{Status, done};

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// A set of guest pages. It is as large as guest RAM by itself. Any thread may use it, several at once.
#[derive(Debug)]
pub struct Set {
    pages: Mutex<PageSet>,
}

// SAFETY: the mark is its own.
unsafe impl Handle for Set {
    const MARK: [u8; 8] = *b"rf   set";
}

/// Consecutive guest pages.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Run {
    /// The guest physical address of the first page.
    pub guest_address: u64,
    /// How many bytes, a multiple of 4096.
    pub bytes: u64,
}

impl From<PageRun> for Run {
    fn from(run: PageRun) -> Self {
        // No page of a set lies beyond 64 TiB.
        Self { guest_address: run.first.0 * PAGE_BYTES, bytes: run.pages * PAGE_BYTES }
    }
}

impl Set {
    /// Lets `fill` add pages below `end`.
    pub(crate) fn fill<T>(&self, end: PageIndex, fill: impl FnOnce(&mut PageSet) -> T) -> T {
        let pages = &mut *self.pages.lock();
        if pages.capacity() < end {
            let before = std::mem::replace(pages, PageSet::new(end));
            pages.union(&before);
        }
        fill(pages)
    }

    /// Lets `read` see the pages.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&PageSet) -> T) -> T {
        read(&self.pages.lock())
    }
}

/// A set without pages.
///
/// # Safety
///
/// `set` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_set_new(set: *mut *mut Set) -> Status {
    done(|| {
        let set = out(set, "set")?;
        let pages = Mutex::new(PageSet::new(PageIndex(0)));
        // SAFETY: the caller's promise.
        unsafe { give(set, Set { pages }) };
        Ok(())
    })
}

/// Frees a set. NULL is allowed.
///
/// # Safety
///
/// The handle is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_set_free(set: *mut Set) -> Status {
    // SAFETY: the caller's promise.
    done(|| unsafe { take_back(set, "set") }.map(drop))
}

/// Removes every page.
///
/// # Safety
///
/// `set` is a set or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_set_clear(set: *const Set) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        unsafe { borrow(set, "set") }?.pages.lock().clear();
        Ok(())
    })
}

/// How many pages of 4096 bytes are in the set.
///
/// # Safety
///
/// `set` is a set or NULL; `pages` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_set_pages(set: *const Set, pages: *mut u64) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let count = unsafe { borrow(set, "set") }?.read(PageSet::len);
        let pages = out(pages, "pages")?;
        // SAFETY: the caller's promise.
        unsafe { pages.put(count) };
        Ok(())
    })
}

/// Whether the page that holds this guest physical address is in the set.
///
/// # Safety
///
/// `set` is a set or NULL; `contained` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_set_contains(
    set: *const Set,
    guest_address: u64,
    contained: *mut bool,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let set = unsafe { borrow(set, "set") }?;
        let contained = out(contained, "contained")?;
        let found = set.read(|pages| pages.contains(PageIndex(guest_address / PAGE_BYTES)));
        // SAFETY: the caller's promise.
        unsafe { contained.put(found) };
        Ok(())
    })
}

/// Removes the pages of a run from the set, whole pages only.
///
/// # Safety
///
/// `set` is a set or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_set_remove(set: *const Set, run: Run) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let set = unsafe { borrow(set, "set") }?;
        let run = crate::slots::whole_pages(run.guest_address, run.bytes)?;
        set.pages.lock().remove_run(run);
        Ok(())
    })
}

/// The pages at and after `from`, a guest physical address, as runs in ascending order, each as long as it can be: up to
/// `capacity` of them go to `runs`, their number to `count`. When it is less than `capacity`, these were the last. To go on,
/// pass the end of the last run as `from`.
///
/// # Safety
///
/// `set` is a set or NULL. `runs` has `capacity` elements, or is NULL with `capacity` 0. `count` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_set_runs(
    set: *const Set,
    from: u64,
    runs: *mut Run,
    capacity: usize,
    count: *mut usize,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let set = unsafe { borrow(set, "set") }?;
        // SAFETY: the caller's promise.
        let runs = unsafe { array(runs, capacity, "runs") }?;
        let count = out(count, "count")?;
        let first = PageIndex(from.div_ceil(PAGE_BYTES));
        let rest = PageRun { first, pages: RAM_END_MAX.0.saturating_sub(first.0) };
        let filled = set.read(|pages| {
            let mut filled = 0;
            for (place, run) in runs.iter_mut().zip(pages.runs_within(rest)) {
                place.write(run.into());
                filled += 1;
            }
            filled
        });
        // SAFETY: the caller's promise.
        unsafe { count.put(filled) };
        Ok(())
    })
}
