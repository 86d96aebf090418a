//! Handles and other pointers that C gives us: what can be checked of them is checked here, and nowhere else.
#![expect(unsafe_code, reason = "C gives pointers, whose validity the header demands")]

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::status::{Failure, Status};

/// What a handle points to: the mark comes first, so that it can be read before anything is believed.
#[repr(C)]
struct Tagged<T> {
    mark: AtomicU64,
    value: T,
}

/// A type whose values C holds by pointer.
///
/// # Safety
///
/// `MARK` is no other type's.
pub(crate) unsafe trait Handle: Sized + Send + Sync {
    /// Eight letters.
    const MARK: [u8; 8];
}

/// The mark of what was freed.
const FREED: [u8; 8] = *b"rf freed";

/// A handle whose mark was looked at.
///
/// # Safety
///
/// As for [`borrow`].
unsafe fn checked<T: Handle>(handle: *const T, name: &'static str) -> Result<NonNull<Tagged<T>>, Failure> {
    let Some(handle) = NonNull::new(handle.cast_mut().cast::<Tagged<T>>()) else {
        return Err(Failure::Null(name));
    };
    if !handle.is_aligned() {
        return Err(Failure::WrongHandle(name));
    }
    // SAFETY: aligned and readable, by the caller's promise. Relaxed: a freed handle is found by luck in any case.
    let mark = unsafe { handle.cast::<AtomicU64>().as_ref() }.load(Ordering::Relaxed);
    if mark == u64::from_ne_bytes(T::MARK) { Ok(handle) } else { Err(Failure::WrongHandle(name)) }
}

/// The value behind a handle. `name` is that of the argument.
///
/// # Safety
///
/// The pointer is NULL, or 8 bytes behind it are readable; if these are the mark of `T`, it is a handle that [`give`] gave and
/// that is not freed while the reference lives.
pub(crate) unsafe fn borrow<'a, T: Handle>(handle: *const T, name: &'static str) -> Result<&'a T, Failure> {
    // SAFETY: the caller's promise.
    let tagged = unsafe { checked(handle, name) }?;
    // SAFETY: it carries the mark, so that by the caller's promise it is a handle of `give`, and lives.
    Ok(&unsafe { tagged.as_ref() }.value)
}

/// Takes a value back that [`give`] gave; `None` for NULL.
///
/// # Safety
///
/// As for [`borrow`]; and nobody else uses the handle, now or later.
pub(crate) unsafe fn take_back<T: Handle>(handle: *mut T, name: &'static str) -> Result<Option<T>, Failure> {
    if handle.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    let tagged = unsafe { checked(handle.cast_const(), name) }?;
    // SAFETY: `give` made it of a box, and nobody else uses it.
    let tagged = unsafe { Box::from_raw(tagged.as_ptr()) };
    // Who comes too late is likely to be found.
    tagged.mark.store(u64::from_ne_bytes(FREED), Ordering::Relaxed);
    Ok(Some(tagged.value))
}

/// Checks a pointer through which a result is returned.
pub(crate) fn out<T>(pointer: *mut T, name: &'static str) -> Result<Out<T>, Failure> {
    NonNull::new(pointer).filter(|pointer| pointer.is_aligned()).map(Out).ok_or(Failure::Null(name))
}

/// Where a result goes.
pub(crate) struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    /// Returns a result.
    ///
    /// # Safety
    ///
    /// The pointer that [`out`] checked can be written.
    pub(crate) unsafe fn put(self, value: T) {
        // SAFETY: not NULL, aligned, and writable by the caller's promise.
        unsafe { self.0.as_ptr().write(value) };
    }
}

/// Gives C a new handle.
///
/// # Safety
///
/// As for [`Out::put`].
pub(crate) unsafe fn give<T: Handle>(out: Out<*mut T>, value: T) {
    let tagged = Tagged { mark: AtomicU64::new(u64::from_ne_bytes(T::MARK)), value };
    // SAFETY: the caller's promise.
    unsafe { out.put(Box::into_raw(Box::new(tagged)).cast()) };
}

/// An array that C lets us fill; NULL is one without elements.
///
/// # Safety
///
/// The pointer is NULL, or `length` elements behind it can be written, and nobody else uses them meanwhile.
pub(crate) unsafe fn array<'a, T>(
    first: *mut T,
    length: usize,
    name: &'static str,
) -> Result<&'a mut [MaybeUninit<T>], Failure> {
    if length == 0 {
        return Ok(&mut []);
    }
    let fits = length.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok());
    let first = NonNull::new(first).filter(|first| fits && first.is_aligned()).ok_or(Failure::Null(name))?;
    // SAFETY: not NULL, aligned, of a possible length, and nothing is said of the content; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(first.as_ptr().cast(), length) })
}

/// An array that C lets us read; NULL is one without elements.
///
/// # Safety
///
/// The pointer is NULL, or `length` elements behind it can be read, and nobody changes them meanwhile.
pub(crate) unsafe fn elements<'a, T>(
    first: *const T,
    length: usize,
    name: &'static str,
) -> Result<&'a [T], Failure> {
    if length == 0 {
        return Ok(&[]);
    }
    let fits = length.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok());
    let first = NonNull::new(first.cast_mut()).filter(|first| fits && first.is_aligned());
    let first = first.ok_or(Failure::Null(name))?;
    // SAFETY: not NULL, aligned, of a possible length; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(first.as_ptr(), length) })
}

/// A text of C's; NULL is an empty one.
///
/// # Safety
///
/// The pointer is NULL, or a text with an end mark is behind it, and nobody changes it meanwhile.
pub(crate) unsafe fn text<'a>(text: *const c_char, name: &'static str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Ok("");
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }.to_str();
    text.map_err(|_| Failure::Named(Status::Argument, name, "is not UTF-8"))
}
