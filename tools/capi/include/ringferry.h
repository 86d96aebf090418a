/*
 * Ringferry's tracking layer for VMMs in C: which pages of a KVM guest are dirty, and which vCPU dirtied them; and the VMM's
 * side of a migration by a process beside it.
 *
 * Generated from tools/capi/src; a test says when it is out of date, and how to write it anew.
 *
 * The five places that a VMM touches are numbered in tools/capi/example/vmm.c:
 *
 *   1. after KVM_CREATE_VM, before the first KVM_CREATE_VCPU      rf_tracker_enable()
 *   2. each memory slot that comes or goes                        rf_tracker_add_slot(), rf_tracker_remove_slot()
 *   3. each vCPU that comes                                       rf_vcpu_attach()
 *   4. around each KVM_RUN                                        rf_vcpu_before_run(), rf_vcpu_ring_full()
 *   5. whoever wants to know                                      rf_session_start(), _observe(), _harvest(), _end()
 *
 * A VMM that a process beside it migrates (`ringferry offload`) has a sixth, shown in tools/capi/example/offload.c:
 *
 *   6. whoever is asked to migrate                                rf_offload_lend(), rf_offload_receive()
 *
 * Errors.  Every function returns an rf_status, except those that return a constant text. A negative status is an error.
 * The text of the last error is kept for each thread by itself: rf_last_error(), on the thread that made the call. No panic of
 * the Rust code leaves the library: it is caught, and becomes RF_INTERNAL.
 *
 * Threads.  Any thread may call any function, several at once, on the same handles, with two exceptions: an rf_vcpu belongs to
 * one thread at a time, and nobody uses a handle while or after it is freed. A VMM may hold its own locks during a call; only
 * rf_offload_lend() and rf_offload_receive() call back, on their caller's thread, and a callback may call the library.
 * rf_vcpu_before_run() takes no lock and makes at most one futex call. rf_vcpu_ring_full() takes the tracker's lock, for which
 * it waits no longer than one harvest. The library handles no signal, and starts one thread for as long as rf_offload_lend()
 * lasts, else none; it blocks signals on the calling thread for the time of a KVM_RESET_DIRTY_RINGS. A process that forks does
 * not use the library in the child.
 *
 * Undefined is what happens when
 *   - a handle is used after it was freed, or while it is being freed (often found, and then RF_WRONG_HANDLE);
 *   - a pointer that is not NULL points to fewer bytes than the function's comment says, or is no handle at all;
 *   - memory of a slot is unmapped before rf_tracker_remove_slot() has returned;
 *   - an rf_vcpu is used by two threads at once.
 * Pages are lost, and nothing else, when the VMM clears KVM_MEM_LOG_DIRTY_PAGES of a tracked slot or calls
 * KVM_RESET_DIRTY_RINGS itself, deletes a slot before rf_tracker_remove_slot(), does not report its own writes, or calls
 * rf_session_harvest_final() too early.
 *
 * Writers that KVM does not see: rf_tracker_mark_dirty() for the VMM's own writes, rf_tracker_add_source() for a log that the VMM
 * has of a device, rf_log_create() for another process, which opens the log with rf_log_writer_open().
 */

#ifndef RINGFERRY_H
#define RINGFERRY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Bytes of the text in an rf_offload_outcome, its end mark included.
 */
#define RF_OFFLOAD_WHY_BYTES 512

/**
 * The exit reason for a full dirty ring, KVM_EXIT_DIRTY_RING_FULL.
 */
#define RF_EXIT_DIRTY_RING_FULL 31

/**
 * The longest that one closing of a gate lasts, in microseconds: a vCPU that waits longer looks hung to its guest.
 */
#define RF_GATE_CLOSED_MAX_US 10000

/**
 * The version of the ABI that this header describes, by the rules of semver.org: with the major version changes what compiled
 * VMMs rely on, with the minor version something is added. While the major version is 0, the minor one takes its place.
 */
#define RF_ABI_MAJOR 0

/**
 * See RF_ABI_MAJOR.
 */
#define RF_ABI_MINOR 1

/**
 * See RF_ABI_MAJOR.
 */
#define RF_ABI_PATCH 0

/**
 * What a call says. A negative status is an error, and rf_last_error() has its text; nothing has changed then, unless
 * the function says otherwise. A later minor version of the ABI may add errors: treat an unknown negative one as an error.
 */
typedef enum {
  /**
   * Done.
   */
  RF_OK = 0,
  /**
   * rf_vcpu_before_run(): do not enter the guest yet; look whether this vCPU is wanted, and call again.
   */
  RF_INTERRUPTED = 1,
  /**
   * rf_session_observe(): this backend does not know what was dirtied before it is harvested.
   */
  RF_UNOBSERVABLE = 2,
  /**
   * A pointer that must not be NULL is.
   */
  RF_NULL = -1,
  /**
   * A handle is of another kind than the function takes, or was freed.
   */
  RF_WRONG_HANDLE = -2,
  /**
   * An argument has a value that is not allowed; the text says which.
   */
  RF_ARGUMENT = -3,
  /**
   * This kernel lacks what was asked for.
   */
  RF_UNSUPPORTED = -4,
  /**
   * The rings must be enabled once, before the first vCPU is created, and large enough for this host.
   */
  RF_TOO_LATE = -5,
  /**
   * The kernel refused for another reason; the text has its answer.
   */
  RF_KERNEL = -6,
  /**
   * A slot with this id is tracked already.
   */
  RF_SLOT_KNOWN = -7,
  /**
   * No slot with this id is tracked.
   */
  RF_SLOT_UNKNOWN = -8,
  /**
   * A slot shares guest pages or host memory with another one.
   */
  RF_SLOT_OVERLAPS = -9,
  /**
   * KVM does not have the slot, or has it otherwise: read-only, on guest_memfd, of another size or at another address.
   */
  RF_SLOT_DIFFERS = -10,
  /**
   * A vCPU with this index is attached already.
   */
  RF_VCPU_KNOWN = -11,
  /**
   * No vCPU is there.
   */
  RF_VCPU_UNKNOWN = -12,
  /**
   * The descriptor is no vCPU with a ring that can be mapped, or one of another VM.
   */
  RF_NOT_VCPU = -13,
  /**
   * A buffer is too small.
   */
  RF_BUFFER_TOO_SMALL = -14,
  /**
   * The ring of a vCPU is out of step with KVM. Nothing was reported clean; stop tracking, and stop the vCPU.
   */
  RF_RING_LOST = -15,
  /**
   * The header that the VMM was compiled with does not fit this library.
   */
  RF_ABI = -16,
  /**
   * The library has a bug, and caught it. Treat all memory as dirty.
   */
  RF_INTERNAL = -17,
  /**
   * Any other error.
   */
  RF_OTHER = -18,
  /**
   * The offload process has died, froze, refused, or said what its place does not allow.
   */
  RF_OFFLOAD = -19,
  /**
   * Cancelled by rf_cancel_set().
   */
  RF_CANCELLED = -20,
  /**
   * A callback of the VMM failed in a way that nothing could be done about: see the function that returns it.
   */
  RF_CALLBACK = -21,
} rf_status;

/**
 * Where a VM is when its offload process has done its work.
 */
typedef enum {
  /**
   * It runs on here; the migration failed.
   */
  RF_OFFLOAD_END_STAYS = 0,
  /**
   * The destination runs it. It stands still here, for good: free it.
   */
  RF_OFFLOAD_END_MOVED = 1,
  /**
   * It was handed over, and nobody knows whether the destination runs it. It stands still here until somebody has looked,
   * and then there are two ways out: if it does not run there, let the vCPUs run again, as `resume` does; if it does,
   * free the VM. A guess may leave two guests running, or none.
   */
  RF_OFFLOAD_END_UNCONFIRMED = 2,
} rf_offload_end;

/**
 * Memory as it is added while a session is open: whether its content is already known to whoever harvests.
 */
typedef enum {
  /**
   * Nobody needs the content that is there now.
   */
  RF_CONTENT_CLEAN = 0,
  /**
   * All of it is dirty, for every session that is open.
   */
  RF_CONTENT_DIRTY = 1,
} rf_content;

/**
 * Ends a migration from outside. Any thread may use it, several at once.
 */
typedef struct rf_cancel rf_cancel;

/**
 * The gate that a vCPU passes before it enters the guest, for whoever throttles. Any thread may use it, several at once.
 */
typedef struct rf_gate rf_gate;

/**
 * A dirty log in shared memory, at the VMM's end.
 */
typedef struct rf_log rf_log;

/**
 * A dirty log in shared memory, at the end of the process that writes guest memory. Any thread may use it, several at once.
 */
typedef struct rf_log_writer rf_log_writer;

/**
 * Takes the pages that a drain callback has found. It is there as long as the callback runs, for the callback's own thread.
 */
typedef struct rf_marks rf_marks;

/**
 * A period of tracking, of one consumer: a migration, a backup, a measurement. Several may be open at once, and each gets every
 * page that is dirtied while it is. Any thread may use it; calls wait for each other.
 */
typedef struct rf_session rf_session;

/**
 * A set of guest pages. It is as large as guest RAM by itself. Any thread may use it, several at once.
 */
typedef struct rf_set rf_set;

/**
 * Takes the state that a callback saves. It is there as long as the callback runs, for the callback's own thread.
 */
typedef struct rf_state_out rf_state_out;

/**
 * Dirty tracking of one VM, for all of the VM's life. Any thread may use it, several at once.
 */
typedef struct rf_tracker rf_tracker;

/**
 * A vCPU, for its thread. Only one thread uses it at a time. It shares no lock with the VMM and, but for
 * rf_vcpu_attach(), allocates nothing.
 */
typedef struct rf_vcpu rf_vcpu;

/**
 * Consecutive guest pages.
 */
typedef struct {
  /**
   * The guest physical address of the first page.
   */
  uint64_t guest_address;
  /**
   * How many bytes, a multiple of 4096.
   */
  uint64_t bytes;
} rf_run;

/**
 * What a migration asks of the VMM. Each function is called with `context`, on the thread that called rf_offload_lend() or
 * rf_offload_receive(), one at a time, and never after that call has returned. It may call this library. It returns: no
 * longjmp, no C++ exception leaves it.
 *
 * Functions that can fail return NULL when they are done, else a text that says why not, in UTF-8: it is copied at once, and
 * stays the VMM's. Functions that are not needed are NULL.
 */
typedef struct {
  /**
   * Whatever the VMM wants to be given.
   */
  void *context;
  /**
   * Stops every vCPU, and returns once all are outside KVM_RUN, those too that wait in rf_vcpu_before_run(). After a failure
   * the VM runs. A source needs it.
   */
  const char *(*pause)(void *context);
  /**
   * Lets every vCPU run, and every device that `quiesce` stopped. After a failure the VM stands still. Both sides need it.
   */
  const char *(*resume)(void *context);
  /**
   * Forces vCPU `index` out of KVM_RUN soon; it must not block. A source needs it.
   */
  void (*kick)(void *context, uint32_t index);
  /**
   * Writes everything that the guest can observe besides RAM, in the VMM's own format, 64 MiB at most, by rf_state_write().
   * The guest stands still. It may write guest memory. A source needs it.
   */
  const char *(*save_state)(void *context, rf_state_out *out);
  /**
   * Stops every device that writes guest memory, while the vCPUs stand still. NULL: there is none.
   */
  const char *(*quiesce)(void *context);
  /**
   * Writes device state that the destination can load in pieces, before RAM is complete: once a round while the guest runs,
   * some `bytes` at a time; and a last time, all the rest, with `stopped`. NULL: there is none.
   */
  const char *(*save_device_state)(void *context, bool stopped, uint64_t bytes, rf_state_out *out);
  /**
   * How many bytes `save_device_state` would write if the guest were stopped now. NULL: 0.
   */
  uint64_t (*device_state_bytes_left)(void *context);
  /**
   * Pages whose content the guest has given up (balloon, free page reporting), and which are not sent unless they are dirtied
   * later. It writes up to `capacity` runs at and after the guest physical address `from` to `runs`, in ascending order,
   * and returns their number. It is called again, from the end of the last run on, as long as it returns `capacity`.
   * NULL: there are none.
   */
  size_t (*discarded_pages)(void *context, uint64_t from, rf_run *runs, size_t capacity);
  /**
   * The guest stands still, and from here on it may run at the destination, whatever becomes of this process. NULL: the VMM
   * need not know. After a failure the VM stays here.
   */
  const char *(*hand_over)(void *context);
  /**
   * At the destination, where RAM is in place: the inverse of `save_state`. A destination needs it.
   */
  const char *(*restore_state)(void *context, const uint8_t *state, size_t bytes);
  /**
   * At the destination: the next piece of what `save_device_state` wrote, cut at any place. It must not touch guest memory.
   * NULL: a VM with such state is refused.
   */
  const char *(*load_device_state)(void *context, const uint8_t *piece, size_t bytes);
  /**
   * At the destination, when the state is restored: takes everything whose taking can fail (locks on images, taps), so that
   * `resume` has nothing left to fail at. NULL: there is nothing.
   */
  const char *(*prepare)(void *context);
  /**
   * At the destination: the VM will not run here. Gives back what `prepare` took. NULL: there is nothing.
   */
  void (*release)(void *context);
} rf_vm;

/**
 * Memory outside guest-physical space.
 */
typedef struct {
  /**
   * Its name.
   */
  const char *name;
  /**
   * Its pages, at the address by which the migration names them.
   */
  rf_run pages;
} rf_offered_block;

/**
 * A VM that comes, for the VMM to build. What it points to is there as long as the callback runs.
 */
typedef struct {
  /**
   * Its name; "" if it has none.
   */
  const char *vm_id;
  /**
   * What the source's VMM says of it: `description_bytes` bytes.
   */
  const uint8_t *description;
  /**
   * See `description`.
   */
  size_t description_bytes;
  /**
   * RAM in guest-physical order: `ram_count` elements.
   */
  const rf_run *ram;
  /**
   * See `ram`.
   */
  size_t ram_count;
  /**
   * Memory outside guest-physical space: `block_count` elements.
   */
  const rf_offered_block *blocks;
  /**
   * See `blocks`.
   */
  size_t block_count;
  /**
   * How many vCPUs it has.
   */
  uint32_t vcpus;
} rf_offer;

/**
 * A piece of guest memory in a file. Where it is mapped, rf_tracker_add_slot() was told.
 */
typedef struct {
  /**
   * The memory slot, as rf_tracker_add_slot() was given it; for a block that is none, any number that no slot has.
   */
  uint32_t slot;
  /**
   * A memfd (or a file on hugetlbfs), which is not cut short while it is lent. It is duplicated.
   */
  int32_t fd;
  /**
   * The guest physical address of its first page.
   */
  uint64_t guest_address;
  /**
   * How long it is. All are multiples of 4096.
   */
  uint64_t bytes;
  /**
   * Where in the file its first page is.
   */
  uint64_t file_offset;
  /**
   * The name of a block of memory outside guest-physical space (VRAM, ROM); NULL for RAM.
   */
  const char *name;
} rf_lent_region;

/**
 * Builds the VM that is offered, without running it. Its memory goes to `memory`, an array of `memory_count` elements that
 * stays the VMM's and is read before anything else is called. NULL, or a text that says why the VM is not taken.
 */
typedef const char *(*rf_build)(void *context,
                                const rf_offer *offer,
                                const rf_lent_region **memory,
                                size_t *memory_count);

/**
 * What tracking did. Sums are since the tracker was made.
 */
typedef struct {
  /**
   * vCPUs that were attached.
   */
  uint64_t vcpus;
  /**
   * Harvests handed out, of all memory or of one slot.
   */
  uint64_t harvests;
  /**
   * Time spent in taking entries, or in getting and scanning bitmaps, in nanoseconds.
   */
  uint64_t harvest_ns;
  /**
   * Calls of KVM_RESET_DIRTY_RINGS, or of KVM_CLEAR_DIRTY_LOG.
   */
  uint64_t resets;
  /**
   * Time spent in them, in nanoseconds.
   */
  uint64_t reset_ns;
  /**
   * Entries that they reset.
   */
  uint64_t entries_reset;
  /**
   * How many of them were interrupted.
   */
  uint64_t short_resets;
  /**
   * Entries that named a slot the tracker does not have, or a page beyond its end: rf_tracker_add_slot() was forgotten.
   */
  uint64_t unknown_slot_entries;
  /**
   * Times that memory was declared dirty and protected anew, after an overflow or interrupted resets.
   */
  uint64_t rearms;
} rf_figures;

/**
 * What one vCPU did. Sums are since it was attached.
 */
typedef struct {
  /**
   * Its index, as rf_vcpu_attach() was given it.
   */
  uint64_t index;
  /**
   * Pages that it was the first to dirty since a harvest.
   */
  uint64_t pages;
  /**
   * Entries whose page was dirty already.
   */
  uint64_t duplicate_entries;
  /**
   * Times that it left the guest because its ring was full.
   */
  uint64_t ring_full_exits;
  /**
   * Time spent in taking its entries, on whatever thread, in nanoseconds.
   */
  uint64_t harvest_ns;
  /**
   * Entries in the ring at the last look.
   */
  uint64_t ring_entries;
  /**
   * The most that `ring_entries` ever was.
   */
  uint64_t ring_entries_max;
  /**
   * Times that the ring overflowed, so that every page was declared dirty.
   */
  uint64_t overflows;
  /**
   * Time for which its gate was closed to it, in nanoseconds.
   */
  uint64_t throttled_ns;
} rf_vcpu_figures;

/**
 * A vCPU that is attached to the tracker.
 */
typedef struct {
  /**
   * Its index, as rf_vcpu_attach() was given it.
   */
  uint32_t index;
  /**
   * Its descriptor, which is duplicated.
   */
  int32_t fd;
} rf_lent_vcpu;

/**
 * What a VMM lends.
 */
typedef struct {
  /**
   * All of guest memory: `memory_count` elements.
   */
  const rf_lent_region *memory;
  /**
   * See `memory`.
   */
  size_t memory_count;
  /**
   * Every vCPU that is attached to the tracker: `vcpu_count` elements.
   */
  const rf_lent_vcpu *vcpus;
  /**
   * See `vcpus`.
   */
  size_t vcpu_count;
  /**
   * The VM's name among those of its owner; NULL if it has none.
   */
  const char *vm_id;
  /**
   * What the destination's VMM has to know to build the VM: `description_bytes` bytes.
   */
  const uint8_t *description;
  /**
   * See `description`.
   */
  size_t description_bytes;
  /**
   * Not 0: the rings stay here, sessions run beside, slots and vCPUs come and go, and `vcpus` may be empty.
   */
  uint32_t keep_rings;
} rf_lent;

/**
 * How a migration has ended.
 */
typedef struct {
  /**
   * Where the VM is.
   */
  rf_offload_end end;
  /**
   * Why, unless it moved.
   */
  char why[RF_OFFLOAD_WHY_BYTES];
} rf_offload_outcome;

/**
 * What one vCPU dirtied.
 */
typedef struct {
  /**
   * Its index, as rf_vcpu_attach() was given it.
   */
  uint32_t index;
  /**
   * Pages since the last harvest that this vCPU was the first to dirty.
   */
  uint64_t pages;
} rf_vcpu_pages;

/**
 * The log of a writer that KVM does not see, kept by the VMM: a device by DMA, a backend with a log of its own. The callbacks run on
 * whatever thread starts, observes, harvests or ends a session, one at a time, and call no function of the library but
 * rf_marks_add().
 */
typedef struct {
  /**
   * Given to each callback.
   */
  void *context;
  /**
   * Begins to log: whatever is written once this has returned will be drained, and what was logged before is forgotten. Returns
   * NULL, or why it cannot, a text that stays valid.
   */
  const char *(*start)(void *context);
  /**
   * Adds every page that was logged to `marks`, and forgets it. Must not be NULL.
   */
  void (*drain)(void *context, const rf_marks *marks);
  /**
   * Ends logging.
   */
  void (*stop)(void *context);
} rf_source;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Waits until the offload process on `connection` (`ringferry offload receive`) has a VM, has it built by `build`, and serves
 * the process on this thread until the VM runs here. The library owns `connection` from the call on, as rf_offload_lend() does.
 * Pass `sizeof *vm` as `vm_bytes`; `vm->context` goes to `build`, too; `cancel` may be NULL.
 *
 * RF_OK: the VM runs here, as `vm->resume` has let it. After an error the VM is the source's; what was built has not run,
 * and must not. Two errors can be different. RF_CALLBACK: `build` refused; or `vm->resume` failed, and then somebody has to look
 * at the source before the VM runs anywhere. RF_INTERNAL: it runs here if `vm->resume` was called.
 *
 * The caller sees to it that:
 *
 * `connection` is negative or open. `vm` has `vm_bytes` bytes or is NULL; its functions and `build` are as described, or NULL.
 * `cancel` is a cancel handle or NULL.
 */
rf_status rf_offload_receive(int32_t connection,
                             const rf_vm *vm,
                             size_t vm_bytes,
                             rf_build build,
                             const rf_cancel *cancel);

/**
 * A cancel handle that has asked for nothing yet. It serves for one migration.
 *
 * The caller sees to it that:
 *
 * `cancel` can be written.
 */
rf_status rf_cancel_new(rf_cancel **cancel);

/**
 * Ends the migration that was given this handle, within 50 ms plus what the callbacks take. A VM that was handed over is not
 * called back, and one that has arrived is not ended.
 *
 * The caller sees to it that:
 *
 * `cancel` is a cancel handle or NULL.
 */
rf_status rf_cancel_set(const rf_cancel *cancel);

/**
 * Frees the handle. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_cancel_free(rf_cancel *cancel);

/**
 * The figures of the whole VM. Pass `sizeof *figures` as `bytes`.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL; `bytes` bytes of `figures` can be written.
 */
rf_status rf_tracker_figures(const rf_tracker *tracker, rf_figures *figures, size_t bytes);

/**
 * The figures of the `nth` vCPU in the order of attachment, from 0; RF_VCPU_UNKNOWN if there are fewer. Pass
 * `sizeof *figures` as `bytes`.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL; `bytes` bytes of `figures` can be written.
 */
rf_status rf_tracker_vcpu_figures(const rf_tracker *tracker,
                                  size_t nth,
                                  rf_vcpu_figures *figures,
                                  size_t bytes);

/**
 * Lends a running VM to the offload process (`ringferry offload send`) that is connected on `connection`, a Unix socket of the
 * type SOCK_SEQPACKET, and serves it on this thread until the migration has ended. Any other thread goes on as before: the
 * vCPUs' threads call what they always call. Unless the rings are kept, the offload process follows them, and meanwhile no
 * session can be started, no slot and no vCPU comes or goes. They are kept on the bitmap, and while a session is open.
 *
 * The library owns `connection` from the call on and closes it, also after an error. `vm` and `lent` are the VMM's again when
 * the call returns. Pass `sizeof *vm` as `vm_bytes`; `cancel` may be NULL.
 *
 * RF_OK: `outcome` says where the VM is. After an error the VM runs here, tracking is the VMM's again, and `outcome` is not
 * written. Two errors are different: after RF_CALLBACK the guest stands still here, because `resume` failed; after
 * RF_INTERNAL it runs here unless `hand_over` was called. A frozen offload process keeps the rings until its socket ends.
 *
 * Besides this thread, a second one serves resets while the call lasts. It calls nothing of the VMM's.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL. `connection` is negative or open. `vm`, what `lent` points to, and the functions of `vm` are
 * as described, or NULL. `cancel` is a cancel handle or NULL. `outcome` can be written.
 */
rf_status rf_offload_lend(const rf_tracker *tracker,
                          int32_t connection,
                          const rf_vm *vm,
                          size_t vm_bytes,
                          const rf_lent *lent,
                          const rf_cancel *cancel,
                          rf_offload_outcome *outcome);

/**
 * Begins a session: what is dirtied from here on will be harvested. Call it on a thread that no vCPU waits for: it
 * write-protects all memory.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL; `session` can be written.
 */
rf_status rf_session_start(const rf_tracker *tracker,
                           rf_session **session);

/**
 * Ends the session and frees the handle, whatever it returns. Its pages are forgotten. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_session_end(rf_session *session);

/**
 * The same, but pages that were dirtied and not harvested, and those that were given back, are dirty in the session that begins
 * next.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_session_end_giving_back(rf_session *session);

/**
 * What was dirtied since the last harvest, by vCPU. The pages stay writable, and the guest feels nothing: look as often as you
 * like, a rate needs two looks. Up to `capacity` elements go to `vcpus`, in the order of attachment; `count` is the number
 * of vCPUs, which may be larger.
 *
 * RF_UNOBSERVABLE: the bitmap knows nothing before a harvest; `count` is 0. A rate is then unknown, and not 0.
 *
 * The caller sees to it that:
 *
 * `session` is a session or NULL. `vcpus` has `capacity` elements, or is NULL with `capacity` 0. `count` can be written.
 */
rf_status rf_session_observe(const rf_session *session,
                             rf_vcpu_pages *vcpus,
                             size_t capacity,
                             size_t *count);

/**
 * Adds to `set` all pages that were dirtied since the last harvest, each write-protected again by the time this returns: now
 * their content may be read. The guest may run meanwhile.
 *
 * After an error the set is as before, and the next harvest hands the pages out.
 *
 * The caller sees to it that:
 *
 * `session` is a session or NULL, `set` a set or NULL.
 */
rf_status rf_session_harvest(const rf_session *session,
                             const rf_set *set);

/**
 * The last and complete harvest. Call it when nothing writes guest memory any more: every vCPU is outside KVM_RUN, devices have
 * stopped, and their state is saved, as saving writes guest memory itself. Whoever calls it earlier loses pages.
 *
 * The caller sees to it that:
 *
 * As for rf_session_harvest().
 */
rf_status rf_session_harvest_final(const rf_session *session,
                                   const rf_set *set);

/**
 * Marks the pages of `set` dirty again, because they were harvested and did not arrive. They come with the next harvest of this
 * session, or of the next one if it ends with rf_session_end_giving_back().
 *
 * The caller sees to it that:
 *
 * As for rf_session_harvest().
 */
rf_status rf_session_give_back(const rf_session *session,
                               const rf_set *set);

/**
 * What KVM_GET_DIRTY_LOG would say of one slot, for code that has asked KVM so far: bit 0 of the first word is the slot's first
 * page. The pages are write-protected again, and leave the session; those of other slots stay. A slot of n pages has
 * (n + 63) / 64 words. RF_BUFFER_TOO_SMALL takes nothing; words behind the slot's last stay as they are.
 *
 * The caller sees to it that:
 *
 * `session` is a session or NULL. `words` has `word_count` elements.
 */
rf_status rf_session_take_slot_bitmap(const rf_session *session,
                                      uint32_t slot,
                                      uint64_t *words,
                                      size_t word_count);

/**
 * The same as runs: adds the slot's dirty pages to `set`. A large slot with few of them costs what is dirty in it.
 *
 * The caller sees to it that:
 *
 * As for rf_session_harvest().
 */
rf_status rf_session_take_slot(const rf_session *session,
                               uint32_t slot,
                               const rf_set *set);

/**
 * A set without pages.
 *
 * The caller sees to it that:
 *
 * `set` can be written.
 */
rf_status rf_set_new(rf_set **set);

/**
 * Frees a set. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_set_free(rf_set *set);

/**
 * Removes every page.
 *
 * The caller sees to it that:
 *
 * `set` is a set or NULL.
 */
rf_status rf_set_clear(const rf_set *set);

/**
 * How many pages of 4096 bytes are in the set.
 *
 * The caller sees to it that:
 *
 * `set` is a set or NULL; `pages` can be written.
 */
rf_status rf_set_pages(const rf_set *set, uint64_t *pages);

/**
 * Whether the page that holds this guest physical address is in the set.
 *
 * The caller sees to it that:
 *
 * `set` is a set or NULL; `contained` can be written.
 */
rf_status rf_set_contains(const rf_set *set, uint64_t guest_address, bool *contained);

/**
 * Removes the pages of a run from the set, whole pages only.
 *
 * The caller sees to it that:
 *
 * `set` is a set or NULL.
 */
rf_status rf_set_remove(const rf_set *set, rf_run run);

/**
 * The pages at and after `from`, a guest physical address, as runs in ascending order, each as long as it can be: up to
 * `capacity` of them go to `runs`, their number to `count`. When it is less than `capacity`, these were the last. To go on,
 * pass the end of the last run as `from`.
 *
 * The caller sees to it that:
 *
 * `set` is a set or NULL. `runs` has `capacity` elements, or is NULL with `capacity` 0. `count` can be written.
 */
rf_status rf_set_runs(const rf_set *set,
                      uint64_t from,
                      rf_run *runs,
                      size_t capacity,
                      size_t *count);

/**
 * The pages in which `bytes` bytes at `guest_address` are were written.
 *
 * The caller sees to it that:
 *
 * `marks` is what the running callback was given, or NULL.
 */
rf_status rf_marks_add(const rf_marks *marks, uint64_t guest_address, uint64_t bytes);

/**
 * From now on the pages that `source` logs are in every harvest. It is started with the first session and stopped with the last;
 * while one is open, at once: its writer must not have begun before. `number` names it for rf_tracker_remove_source().
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL, `source` and `number` point to such or are NULL. What the callbacks need lives until
 * rf_tracker_remove_source() has returned, or all handles of the tracker are freed.
 */
rf_status rf_tracker_add_source(const rf_tracker *tracker,
                                const rf_source *source,
                                uint64_t *number);

/**
 * Takes a source or a log out again, once its writer has stopped; what it has logged stays dirty. RF_ARGUMENT if it is gone already.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL.
 */
rf_status rf_tracker_remove_source(const rf_tracker *tracker,
                                   uint64_t number);

/**
 * Creates a log of `bytes` bytes of guest memory from `guest_address` on, multiples of 4096, that another process writes: a jailed
 * device, a backend. Each process that is not trusted with the marks of another gets a log of its own.
 *
 * The caller sees to it that:
 *
 * `log` can be written.
 */
rf_status rf_log_create(uint64_t guest_address,
                        uint64_t bytes,
                        rf_log **log);

/**
 * The descriptor to pass to the other process (SCM_RIGHTS), for rf_log_writer_open(). It is the log's, and closed with it.
 *
 * The caller sees to it that:
 *
 * `log` is a log or NULL, `fd` can be written.
 */
rf_status rf_log_fd(const rf_log *log,
                    int32_t *fd);

/**
 * From now on the pages that the log's writer marks are in every harvest, as for rf_tracker_add_source(). The log may be freed
 * afterwards: the tracker has it.
 *
 * The caller sees to it that:
 *
 * `tracker` and `log` are such or NULL, `number` can be written.
 */
rf_status rf_tracker_add_log(const rf_tracker *tracker,
                             const rf_log *log,
                             uint64_t *number);

/**
 * Frees the handle. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_log_free(rf_log *log);

/**
 * Opens a log that the VMM has passed on, in the process that writes guest memory. The descriptor is duplicated.
 *
 * The caller sees to it that:
 *
 * `writer` can be written.
 */
rf_status rf_log_writer_open(int32_t fd,
                             rf_log_writer **writer);

/**
 * The pages in which `bytes` bytes at `guest_address` are were written: call it after the write, from any thread. It takes no lock
 * and makes no system call; a fence and a load while no session is open. Pages that the log is not for are left out.
 *
 * The caller sees to it that:
 *
 * `writer` is a writer or NULL.
 */
rf_status rf_log_writer_mark(const rf_log_writer *writer,
                             uint64_t guest_address,
                             uint64_t bytes);

/**
 * Frees the handle. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_log_writer_free(rf_log_writer *writer);

/**
 * Writes the next `length` bytes of the state. It may wait while the destination is behind. After an error no more is taken:
 * the callback returns a text, and its migration ends.
 *
 * The caller sees to it that:
 *
 * `out` is what the running callback was given, or NULL. `bytes` has `length` bytes.
 */
rf_status rf_state_write(const rf_state_out *out,
                         const void *bytes,
                         size_t length);

/**
 * The text of the last call that failed on the calling thread: what was tried, what was found, what to do. It has at most
 * 511 bytes of UTF-8, and is "" if none failed.
 *
 * The text belongs to the library. It stays as it is until another call fails on this thread, or the thread ends.
 */
const char *rf_last_error(void);

/**
 * The name of a status, as "RF_SLOT_UNKNOWN"; "RF_?" for a number that is none. The text is constant.
 */
const char *rf_status_name(int32_t status);

/**
 * Gives every vCPU that is created from now on a dirty ring of `ring_entries` entries: a power of two from 256 to 65536, 16
 * bytes each, or 0 for the largest. Call it after KVM_CREATE_VM and before the first KVM_CREATE_VCPU; on arm64 also before
 * the first memory slot. It cannot be undone: from then on KVM answers ENXIO to KVM_GET_DIRTY_LOG for this VM, and
 * rf_session_take_slot_bitmap() stands in for it.
 *
 * The descriptor is duplicated; the VMM may close its own.
 *
 * The caller sees to it that:
 *
 * `tracker` can be written.
 */
rf_status rf_tracker_enable(int32_t vm_fd,
                            uint32_t ring_entries,
                            rf_tracker **tracker);

/**
 * Tracks by KVM's bitmap instead, with manual protection.
 *
 * The caller sees to it that:
 *
 * As for rf_tracker_enable().
 */
rf_status rf_tracker_enable_bitmap(int32_t vm_fd, rf_tracker **tracker);

/**
 * As rf_tracker_enable() where this kernel has rings, else as rf_tracker_enable_bitmap(). Any other failure is one: the
 * bitmap is no answer to a call that comes too late.
 *
 * The caller sees to it that:
 *
 * As for rf_tracker_enable().
 */
rf_status rf_tracker_enable_or_bitmap(int32_t vm_fd,
                                      uint32_t ring_entries,
                                      rf_tracker **tracker);

/**
 * Frees the handle. Sessions, vCPUs and gates of the tracker live on until they are freed themselves; the rings of the VM
 * stay. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_tracker_free(rf_tracker *tracker);

/**
 * How it tracks: "ring" or "bitmap", a constant text; NULL if `tracker` is no tracker.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL.
 */
const char *rf_tracker_backend(const rf_tracker *tracker);

/**
 * Tracks a memory slot from now on. Call it after KVM_SET_USER_MEMORY_REGION has created the slot, and leave
 * KVM_MEM_LOG_DIRTY_PAGES alone: the tracker sets and clears it. Slots that are read-only or on guest_memfd are left out.
 *
 * `slot` is what KVM was given, the address space in its upper 16 bits. `host` is where its first page is mapped in this
 * process, `content` one of RF_CONTENT_CLEAN and RF_CONTENT_DIRTY. All are multiples of 4096.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL. [`host`, `host` + `bytes`) stays mapped readable and writable until rf_tracker_remove_slot()
 * has returned, or all handles of the tracker are freed.
 */
rf_status rf_tracker_add_slot(const rf_tracker *tracker,
                              uint32_t slot,
                              uint64_t guest_address,
                              uint64_t bytes,
                              void *host,
                              int32_t content);

/**
 * Forgets a slot. Call it before KVM_SET_USER_MEMORY_REGION deletes or moves the slot: a ring entry that names it would count
 * for the next slot with this id. A slot that was moved is added anew. RF_SLOT_UNKNOWN tells that the slot was not
 * tracked.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL.
 */
rf_status rf_tracker_remove_slot(const rf_tracker *tracker,
                                 uint32_t slot);

/**
 * Marks the pages dirty in which `bytes` bytes at `guest_address` are: the VMM itself wrote them, or a device on its behalf.
 * Neither rings nor bitmap see such writes. Call it after the write, from any thread. It costs a fence and a load while no
 * session is open. Addresses that no slot has are ignored.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL.
 */
rf_status rf_tracker_mark_dirty(const rf_tracker *tracker,
                                uint64_t guest_address,
                                uint64_t bytes);

/**
 * Follows a vCPU, at start-up or when it is plugged in. Call it after KVM_CREATE_VCPU and before the vCPU first runs. `index`
 * is the VMM's own number of the vCPU.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL; `vcpu` can be written.
 */
rf_status rf_vcpu_attach(const rf_tracker *tracker,
                         uint32_t index,
                         int32_t vcpu_fd,
                         rf_vcpu **vcpu);

/**
 * A vCPU is unplugged: harvests what its ring still holds and forgets it; its index is free. Call it once the vCPU has left
 * KVM_RUN for good, or until it is attached again. The vCPU's handles stay to be freed.
 *
 * The caller sees to it that:
 *
 * `tracker` is a tracker or NULL.
 */
rf_status rf_vcpu_detach(const rf_tracker *tracker,
                         uint32_t index);

/**
 * Call it before each KVM_RUN: RF_OK is the word to enter the guest. It costs a load when nobody throttles, else a futex
 * wait of at most 10 ms.
 *
 * RF_INTERRUPTED means that a signal came, or that the gate was closed anew: look whether the VMM wants something of this
 * vCPU, and call again. To call a vCPU out for good, tell its thread so, send the signal, and open the gate, in this order.
 * A vCPU that completes pending I/O with `immediate_exit` set does not enter the guest, and passes no gate.
 *
 * The call is compulsory with rings: a vCPU whose ring is full again and again without it ends in RF_RING_LOST.
 *
 * The caller sees to it that:
 *
 * `vcpu` is a vCPU or NULL.
 */
rf_status rf_vcpu_before_run(const rf_vcpu *vcpu);

/**
 * Call it when KVM_RUN has returned with RF_EXIT_DIRTY_RING_FULL: it recycles the ring, here and now. Then run the vCPU
 * again; if it comes back with the same reason, call again.
 *
 * After an error the vCPU cannot run on. Nothing dirty is lost.
 *
 * The caller sees to it that:
 *
 * `vcpu` is a vCPU or NULL.
 */
rf_status rf_vcpu_ring_full(const rf_vcpu *vcpu);

/**
 * Frees the handle. What the ring still holds is harvested all the same, also when the vCPU is gone. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_vcpu_free(rf_vcpu *vcpu);

/**
 * The gate of a vCPU. Call it before the vCPU's thread begins, and hand the gate to the throttle. Each call gives another
 * handle to the same gate.
 *
 * The caller sees to it that:
 *
 * `vcpu` is a vCPU or NULL; `gate` can be written.
 */
rf_status rf_vcpu_gate(const rf_vcpu *vcpu,
                       rf_gate **gate);

/**
 * Keeps the vCPU out of the guest for so many microseconds from now, RF_GATE_CLOSED_MAX_US at most; what was set before no
 * longer counts. The gate opens by itself. A vCPU that is inside notices when it comes out: kick it, by a signal or
 * whatever the VMM has.
 *
 * The caller sees to it that:
 *
 * `gate` is a gate or NULL.
 */
rf_status rf_gate_close(const rf_gate *gate,
                        uint64_t microseconds);

/**
 * Lets the vCPU into the guest at once.
 *
 * The caller sees to it that:
 *
 * `gate` is a gate or NULL.
 */
rf_status rf_gate_open(const rf_gate *gate);

/**
 * How long the vCPU has waited at the gate altogether, in nanoseconds.
 *
 * The caller sees to it that:
 *
 * `gate` is a gate or NULL; `nanoseconds` can be written.
 */
rf_status rf_gate_throttled_ns(const rf_gate *gate, uint64_t *nanoseconds);

/**
 * Frees the handle; the gate stays as it is. NULL is allowed.
 *
 * The caller sees to it that:
 *
 * The handle is not used any more.
 */
rf_status rf_gate_free(rf_gate *gate);

/**
 * The version of the library, as "0.1.0". The text is constant.
 */
const char *rf_version(void);

/**
 * Whether the library has what a VMM was compiled for. Call it first: `rf_check_abi(RF_ABI_MAJOR, RF_ABI_MINOR)`. RF_ABI if
 * not.
 */
rf_status rf_check_abi(uint32_t major,
                       uint32_t minor);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* RINGFERRY_H */
