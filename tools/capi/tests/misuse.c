/* Wrong calls: each gives an error and a text, and none of them crashes. Exits 0 if all do, else it says which does not. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ringferry.h"

#define SLOT_BYTES (1ULL << 20)

/* `text` is a part of what rf_last_error() says. */
#define EXPECT(call, wanted, text) expect(#call, call, wanted, text)

static void expect(const char *call, rf_status found, rf_status wanted, const char *text) {
    if (found != wanted || (found < 0 && strstr(rf_last_error(), text) == NULL)) {
        fprintf(stderr, "%s: %s (%s), not %s (%s)\n", call, rf_status_name(found), rf_last_error(), rf_status_name(wanted), text);
        exit(1);
    }
}

static int new_vm(int kvm, uint8_t *ram) {
    struct kvm_userspace_memory_region region = {.memory_size = SLOT_BYTES, .userspace_addr = (uintptr_t)ram};
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0) {
        perror("a VM");
        exit(1);
    }
    return vm;
}

static const char *yes(void *context) {
    return context;
}

static void kick(void *context, uint32_t index) {
    (void)context, (void)index;
}

static const char *save_nothing(void *context, rf_state_out *out) {
    (void)out;
    return context;
}

int main(void) {
    int kvm = open("/dev/kvm", O_RDWR);
    uint8_t *ram = mmap(NULL, SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int vm = new_vm(kvm, ram), other_vm = new_vm(kvm, ram);
    rf_tracker *tracker = NULL, *none = NULL;
    rf_session *session = NULL;
    rf_vcpu *vcpu = NULL;
    rf_gate *gate = NULL;
    rf_set *set = NULL;
    size_t count = 7;
    uint64_t number;
    bool contained;

    EXPECT(rf_check_abi(RF_ABI_MAJOR, RF_ABI_MINOR), RF_OK, "");
    EXPECT(rf_check_abi(RF_ABI_MAJOR + 1, 0), RF_ABI, "compile it anew");

    /* Enabling. */
    EXPECT(rf_tracker_enable(vm, 0, NULL), RF_NULL, "tracker is NULL");
    EXPECT(rf_tracker_enable(vm, 1000, &none), RF_ARGUMENT, "power of two");
    EXPECT(rf_tracker_enable(-1, 0, &none), RF_KERNEL, "");
    EXPECT(rf_tracker_enable(STDERR_FILENO, 0, &none), RF_KERNEL, "");
    int early = ioctl(other_vm, KVM_CREATE_VCPU, 0);
    EXPECT(rf_tracker_enable(other_vm, 0, &none), RF_TOO_LATE, "before the first vCPU");
    EXPECT(rf_tracker_enable_or_bitmap(other_vm, 0, &none), RF_TOO_LATE, "before the first vCPU");
    if (none != NULL)
        return 2;
    EXPECT(rf_tracker_enable(vm, 4096, &tracker), RF_OK, "");
    EXPECT(rf_tracker_enable(vm, 4096, &none), RF_TOO_LATE, "once");
    EXPECT(rf_set_new(&set), RF_OK, "");

    /* Handles. */
    EXPECT(rf_session_start(NULL, &session), RF_NULL, "tracker is NULL");
    EXPECT(rf_session_start((const rf_tracker *)set, &session), RF_WRONG_HANDLE, "tracker");
    EXPECT(rf_session_harvest((const rf_session *)tracker, set), RF_WRONG_HANDLE, "session");
    EXPECT(rf_vcpu_before_run((const rf_vcpu *)tracker), RF_WRONG_HANDLE, "vcpu");
    EXPECT(rf_vcpu_before_run((const rf_vcpu *)((const char *)tracker + 1)), RF_WRONG_HANDLE, "vcpu");
    EXPECT(rf_vcpu_ring_full(NULL), RF_NULL, "vcpu is NULL");
    EXPECT(rf_gate_open((const rf_gate *)set), RF_WRONG_HANDLE, "gate");
    EXPECT(rf_tracker_free((rf_tracker *)set), RF_WRONG_HANDLE, "tracker");
    EXPECT(rf_set_free(NULL), RF_OK, "");
    EXPECT(rf_session_end(NULL), RF_OK, "");
    if (rf_tracker_backend(NULL) != NULL || strcmp(rf_tracker_backend(tracker), "ring") != 0)
        return 3;

    /* Slots. */
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, SLOT_BYTES, NULL, RF_CONTENT_DIRTY), RF_NULL, "host");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, 0, ram, RF_CONTENT_DIRTY), RF_ARGUMENT, "length");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, 4097, ram, RF_CONTENT_DIRTY), RF_ARGUMENT, "length");
    EXPECT(rf_tracker_add_slot(tracker, 0, 1, SLOT_BYTES, ram, RF_CONTENT_DIRTY), RF_ARGUMENT, "guest address");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, SLOT_BYTES, ram + 1, RF_CONTENT_DIRTY), RF_ARGUMENT, "aligned");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, 1ULL << 60, ram, RF_CONTENT_DIRTY), RF_ARGUMENT, "too large");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, SLOT_BYTES, ram, 2), RF_ARGUMENT, "content");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, SLOT_BYTES, ram, RF_CONTENT_CLEAN), RF_OK, "");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, SLOT_BYTES, ram, RF_CONTENT_CLEAN), RF_SLOT_KNOWN, "");
    EXPECT(rf_tracker_add_slot(tracker, 1, 4096, SLOT_BYTES, ram, RF_CONTENT_CLEAN), RF_SLOT_OVERLAPS, "");
    EXPECT(rf_tracker_remove_slot(tracker, 9), RF_SLOT_UNKNOWN, "0x9");

    /* vCPUs. */
    EXPECT(rf_vcpu_attach(tracker, 0, kvm, &vcpu), RF_NOT_VCPU, "vCPU");
    EXPECT(rf_vcpu_attach(tracker, 0, -1, &vcpu), RF_NOT_VCPU, "vCPU");
    int fd = ioctl(vm, KVM_CREATE_VCPU, 0);
    EXPECT(rf_vcpu_attach(tracker, 0, fd, NULL), RF_NULL, "vcpu is NULL");
    EXPECT(rf_vcpu_attach(tracker, 0, fd, &vcpu), RF_OK, "");
    EXPECT(rf_vcpu_attach(tracker, 0, fd, &vcpu), RF_VCPU_KNOWN, "index 0");
    EXPECT(rf_vcpu_gate(vcpu, &gate), RF_OK, "");
    EXPECT(rf_gate_throttled_ns(gate, NULL), RF_NULL, "nanoseconds");

    /* Offload: refused before anything is asked of the VM. A connection is the library's, also when it is none. */
    rf_cancel *cancel = NULL;
    rf_offload_outcome outcome;
    rf_lent_region ram_file = {.fd = -1, .bytes = SLOT_BYTES};
    rf_lent lent = {.memory = &ram_file, .memory_count = 1, .description_bytes = 1};
    rf_vm asked = {.pause = yes, .resume = yes, .kick = kick};
    EXPECT(rf_cancel_new(NULL), RF_NULL, "cancel is NULL");
    EXPECT(rf_cancel_new(&cancel), RF_OK, "");
    EXPECT(rf_cancel_set((const rf_cancel *)set), RF_WRONG_HANDLE, "cancel");
    EXPECT(rf_offload_lend(tracker, -1, &asked, sizeof asked, &lent, cancel, &outcome), RF_ARGUMENT, "connection is negative");
    EXPECT(rf_offload_lend(NULL, dup(kvm), &asked, sizeof asked, &lent, cancel, &outcome), RF_NULL, "tracker");
    EXPECT(rf_offload_lend(tracker, dup(kvm), NULL, sizeof asked, &lent, cancel, &outcome), RF_NULL, "vm is NULL");
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked + 8, &lent, cancel, &outcome), RF_ABI, "sizeof");
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked, &lent, cancel, &outcome), RF_NULL, "vm->save_state");
    asked.save_state = save_nothing;
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, 8, &lent, cancel, &outcome), RF_NULL, "vm->pause");
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked, NULL, cancel, &outcome), RF_NULL, "lent is NULL");
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked, &lent, cancel, &outcome), RF_ARGUMENT, "descriptor of a region");
    ram_file.fd = kvm;
    ram_file.guest_address = 1;
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked, &lent, cancel, &outcome), RF_ARGUMENT, "guest address");
    ram_file.guest_address = 0;
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked, &lent, cancel, &outcome), RF_NULL, "lent->description");
    lent.description_bytes = 0;
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked, &lent, cancel, NULL), RF_NULL, "outcome is NULL");
    EXPECT(rf_offload_lend(tracker, dup(kvm), &asked, sizeof asked, &lent, cancel, &outcome), RF_OFFLOAD, "");
    EXPECT(rf_offload_receive(dup(kvm), &asked, sizeof asked, NULL, cancel), RF_NULL, "vm->restore_state");
    EXPECT(rf_state_write(NULL, "", 1), RF_NULL, "out is NULL");
    EXPECT(rf_state_write((const rf_state_out *)set, "", 1), RF_WRONG_HANDLE, "out");
    EXPECT(rf_cancel_free(cancel), RF_OK, "");

    /* Sessions. */
    rf_session *second = NULL;
    uint64_t words[SLOT_BYTES / 4096 / 64];
    EXPECT(rf_session_start(tracker, &session), RF_OK, "");
    EXPECT(rf_session_start(tracker, &second), RF_OK, "");
    EXPECT(rf_session_observe(session, NULL, 0, NULL), RF_NULL, "count");
    EXPECT(rf_session_observe(session, NULL, 1, &count), RF_NULL, "vcpus");
    EXPECT(rf_session_observe(session, NULL, 0, &count), RF_OK, "");
    EXPECT(rf_session_harvest(session, NULL), RF_NULL, "set");
    EXPECT(rf_session_take_slot_bitmap(session, 0, words, 3), RF_BUFFER_TOO_SMALL, "0x4");
    EXPECT(rf_session_take_slot_bitmap(session, 9, words, 4), RF_SLOT_UNKNOWN, "0x9");
    EXPECT(rf_session_take_slot(session, 9, set), RF_SLOT_UNKNOWN, "0x9");
    if (count != 1)
        return 4;

    /* Pages: what was marked comes once, as words, as runs, or in a set; given back, it comes again. */
    EXPECT(rf_tracker_mark_dirty(tracker, 0x41fff, 2), RF_OK, "");
    EXPECT(rf_tracker_mark_dirty(tracker, UINT64_MAX, UINT64_MAX), RF_OK, "");
    EXPECT(rf_session_take_slot_bitmap(session, 0, words, 4), RF_OK, "");
    if (words[0] != 0 || words[1] != 6 || words[2] != 0 || words[3] != 0)
        return 5;
    words[1] = 0;
    EXPECT(rf_session_take_slot_bitmap(second, 0, words, 4), RF_OK, "");
    if (words[1] != 6)
        return 15;
    EXPECT(rf_session_end_giving_back(second), RF_OK, "");
    EXPECT(rf_tracker_mark_dirty(tracker, 0x5000, 1), RF_OK, "");
    EXPECT(rf_session_take_slot(session, 0, set), RF_OK, "");
    EXPECT(rf_tracker_mark_dirty(tracker, 0x8000, 0x2000), RF_OK, "");
    EXPECT(rf_session_harvest(session, set), RF_OK, "");
    rf_run runs[3] = {{0, 0}};
    EXPECT(rf_set_runs(set, 0, runs, 3, NULL), RF_NULL, "count");
    EXPECT(rf_set_runs(set, 0, runs, 3, &count), RF_OK, "");
    if (count != 2 || runs[0].guest_address != 0x5000 || runs[0].bytes != 0x1000 || runs[1].guest_address != 0x8000 || runs[1].bytes != 0x2000)
        return 6;
    EXPECT(rf_set_runs(set, 0x9000, runs, 3, &count), RF_OK, "");
    if (count != 1 || runs[0].guest_address != 0x9000)
        return 7;
    EXPECT(rf_set_runs(set, UINT64_MAX, runs, 3, &count), RF_OK, "");
    EXPECT(rf_set_remove(set, (rf_run){0x8001, 4096}), RF_ARGUMENT, "guest address");
    EXPECT(rf_set_remove(set, (rf_run){0x8000, 0x1000}), RF_OK, "");
    EXPECT(rf_set_contains(set, UINT64_MAX, &contained), RF_OK, "");
    EXPECT(rf_session_give_back(session, set), RF_OK, "");
    EXPECT(rf_set_clear(set), RF_OK, "");
    EXPECT(rf_session_harvest_final(session, set), RF_OK, "");
    EXPECT(rf_set_pages(set, &number), RF_OK, "");
    if (contained || number != 2)
        return 8;

    /* Figures: a struct that is shorter or longer than the library's. */
    struct { rf_figures known; uint64_t beyond; } figures = {{0}, 7};
    EXPECT(rf_tracker_figures(tracker, NULL, sizeof figures.known), RF_NULL, "figures");
    EXPECT(rf_tracker_figures(tracker, &figures.known, 8), RF_OK, "");
    if (figures.known.vcpus != 1 || figures.known.harvests != 0 || figures.beyond != 7)
        return 9;
    EXPECT(rf_tracker_figures(tracker, &figures.known, sizeof figures), RF_OK, "");
    if (figures.known.harvests != 5 || figures.beyond != 0)
        return 10;
    rf_vcpu_figures of_vcpu;
    EXPECT(rf_tracker_vcpu_figures(tracker, 1, &of_vcpu, sizeof of_vcpu), RF_VCPU_UNKNOWN, "0x1");

    /* The tracker goes first: the others live on. */
    EXPECT(rf_tracker_free(tracker), RF_OK, "");
    EXPECT(rf_session_harvest(session, set), RF_OK, "");
    EXPECT(rf_vcpu_before_run(vcpu), RF_OK, "");
    EXPECT(rf_session_end(session), RF_OK, "");
    EXPECT(rf_vcpu_free(vcpu), RF_OK, "");
    EXPECT(rf_gate_close(gate, UINT64_MAX), RF_OK, "");
    EXPECT(rf_gate_free(gate), RF_OK, "");
    EXPECT(rf_set_free(set), RF_OK, "");

    /* The bitmap, on a VM that has a vCPU already. */
    EXPECT(rf_tracker_enable_bitmap(other_vm, &tracker), RF_OK, "");
    EXPECT(rf_tracker_add_slot(tracker, 0, 0, SLOT_BYTES, ram, RF_CONTENT_CLEAN), RF_OK, "");
    EXPECT(rf_session_start(tracker, &session), RF_OK, "");
    count = 7;
    EXPECT(rf_session_observe(session, NULL, 0, &count), RF_UNOBSERVABLE, "");
    if (count != 0 || strcmp(rf_tracker_backend(tracker), "bitmap") != 0)
        return 11;
    EXPECT(rf_session_end(session), RF_OK, "");
    EXPECT(rf_tracker_free(tracker), RF_OK, "");
    close(early);
    close(fd);
    close(vm);
    close(other_vm);
    close(kvm);
    munmap(ram, SLOT_BYTES);
    puts("every wrong call was refused");
    return 0;
}
