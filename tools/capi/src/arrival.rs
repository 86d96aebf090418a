//! A VMM in C takes a VM that a migration process beside it receives.
#![expect(unsafe_code, reason = "functions are called from C, with pointers")]

use std::ffi::{CString, c_char, c_void};

use ringferry::offload::{Arrived, Offer as RustOffer, RegionFile, receive};
use ringferry::vm::VmError;
use ringferry::{PageRun, RAM_END_MAX};

use crate::callbacks::{CVm, VmCallbacks, said};
use crate::cancel::Cancel;
use crate::handle::elements;
use crate::lent::{LentRegion, own};
use crate::set::Run;
use crate::status::{Failure, Status, done};

/// Memory outside guest-physical space.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct OfferedBlock {
    /// Its name.
    pub name: *const c_char,
    /// Its pages, at the address by which the migration names them.
    pub pages: Run,
}

/// A VM that comes, for the VMM to build. What it points to is there as long as the callback runs.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Offer {
    /// Its name; "" if it has none.
    pub vm_id: *const c_char,
    /// What the source's VMM says of it: `description_bytes` bytes.
    pub description: *const u8,
    /// See `description`.
    pub description_bytes: usize,
    /// RAM in guest-physical order: `ram_count` elements.
    pub ram: *const Run,
    /// See `ram`.
    pub ram_count: usize,
    /// Memory outside guest-physical space: `block_count` elements.
    pub blocks: *const OfferedBlock,
    /// See `blocks`.
    pub block_count: usize,
    /// How many vCPUs it has.
    pub vcpus: u32,
}

/// Builds the VM that is offered, without running it. Its memory goes to `memory`, an array of `memory_count` elements that
/// stays the VMM's and is read before anything else is called. NULL, or a text that says why the VM is not taken.
pub type Build = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        offer: *const Offer,
        memory: *mut *const LentRegion,
        memory_count: *mut usize,
    ) -> *const c_char,
>;

/// Waits until the offload process on `connection` (`ringferry offload receive`) has a VM, has it built by `build`, and serves
/// the process on this thread until the VM runs here. The library owns `connection` from the call on, as rf_offload_lend() does.
/// Pass `sizeof *vm` as `vm_bytes`; `vm->context` goes to `build`, too; `cancel` may be NULL.
///
/// RF_OK: the VM runs here, as `vm->resume` has let it. After an error the VM is the source's; what was built has not run,
/// and must not. Two errors can be different. RF_CALLBACK: `build` refused; or `vm->resume` failed, and then somebody has to look
/// at the source before the VM runs anywhere. RF_INTERNAL: it runs here if `vm->resume` was called.
///
/// # Safety
///
/// `connection` is negative or open. `vm` has `vm_bytes` bytes or is NULL; its functions and `build` are as described, or NULL.
/// `cancel` is a cancel handle or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rf_offload_receive(
    connection: i32,
    vm: *const VmCallbacks,
    vm_bytes: usize,
    build: Build,
    cancel: *const Cancel,
) -> Status {
    done(|| {
        // SAFETY: the caller's promise.
        let connection = unsafe { own(connection) }?;
        // SAFETY: the caller's promise.
        let vm = unsafe { CVm::new(vm, vm_bytes) }?;
        vm.can_receive()?;
        let build = build.ok_or(Failure::Null("build"))?;
        // SAFETY: the caller's promise.
        let cancel = unsafe { Cancel::asked(cancel) }?;
        let built = |offer: &RustOffer| {
            let mut memory = std::ptr::null();
            let mut count = 0;
            let regions = for_c(offer, |offer| {
                // SAFETY: the caller's promise; the others are local variables.
                unsafe { said(build(vm.context(), offer, &raw mut memory, &raw mut count)) }?;
                // SAFETY: the header demands an array of so many elements.
                unsafe { files(memory, count) }.map_err(|failure| failure.to_string().into())
            })?;
            Ok((vm, regions))
        };
        let Arrived { .. } = receive(connection, built, &cancel)?;
        Ok(())
    })
}

/// # Safety
///
/// `memory` is NULL or has `count` elements, whose descriptors are open and whose names are texts or NULL.
unsafe fn files(memory: *const LentRegion, count: usize) -> Result<Vec<RegionFile>, Failure> {
    // SAFETY: the caller's promise.
    let memory = unsafe { elements(memory, count, "the memory of the VM that was built") }?;
    // SAFETY: the caller's promise.
    memory.iter().map(|region| unsafe { region.to_file() }).collect()
}

/// Lets `use_it` see an offer as C does.
fn for_c<T>(offer: &RustOffer, use_it: impl FnOnce(&Offer) -> Result<T, VmError>) -> Result<T, VmError> {
    let vm_id = CString::new(offer.vm_id.as_str())?;
    let ram = offer.ram.iter().map(run).collect::<Result<Vec<_>, _>>()?;
    let names = offer.blocks.iter().map(|(name, _)| CString::new(name.as_str()));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    let block = |((_, pages), name): (&(String, PageRun), &CString)| {
        Ok::<_, VmError>(OfferedBlock { name: name.as_ptr(), pages: run(pages)? })
    };
    let blocks = offer.blocks.iter().zip(&names).map(block).collect::<Result<Vec<_>, _>>()?;
    use_it(&Offer {
        vm_id: vm_id.as_ptr(),
        description: offer.description.as_ptr(),
        description_bytes: offer.description.len(),
        ram: ram.as_ptr(),
        ram_count: ram.len(),
        blocks: blocks.as_ptr(),
        block_count: blocks.len(),
        vcpus: offer.vcpus,
    })
}

/// A run whose bytes can be counted.
fn run(pages: &PageRun) -> Result<Run, VmError> {
    match pages.first.0.checked_add(pages.pages) {
        Some(end) if end <= RAM_END_MAX.0 => Ok((*pages).into()),
        _ => Err("the offer has memory beyond 64 TiB".into()),
    }
}
