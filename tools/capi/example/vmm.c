/*
 * A VMM of two vCPUs in C that knows its dirty pages: what it takes to link Ringferry.
 *
 * The five places that Ringferry touches are numbered; everything else is what any VMM does. guest.h has the guest.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"

#define VCPUS 2

struct vcpu {
    pthread_t thread;
    int fd;
    struct kvm_run *run;
    rf_vcpu *tracked;
    rf_gate *gate;
    _Atomic uint64_t passes;
};

static atomic_bool stop;

/* A vCPU's thread. It takes no lock of the VMM's, and allocates nothing. */
static void *run_vcpu(void *argument) {
    struct vcpu *vcpu = argument;
    while (!atomic_load(&stop)) {
        /* 4. Around KVM_RUN: one load before, and an answer to exit reason 31 after. */
        if (rf_vcpu_before_run(vcpu->tracked) != RF_OK)
            continue;
        if (ioctl(vcpu->fd, KVM_RUN, 0) < 0 && errno != EINTR)
            fail("KVM_RUN");
        switch (vcpu->run->exit_reason) {
        case RF_EXIT_DIRTY_RING_FULL:
            check("recycling a full ring", rf_vcpu_ring_full(vcpu->tracked));
            break;
        case KVM_EXIT_IO: /* The guest comes back at the end of each pass, by a port write. */
            vcpu->passes++;
            break;
        case KVM_EXIT_INTR:
            break;
        default:
            fprintf(stderr, "unexpected exit reason %u\n", vcpu->run->exit_reason);
            exit(1);
        }
    }
    return NULL;
}

/* Whether every page of [from, from + bytes) is in the set, by its runs. */
static bool has_all(const rf_set *set, uint64_t from, uint64_t bytes) {
    rf_run runs[16];
    uint64_t next = from, found = 0;
    for (size_t count = 16; count == 16;) {
        check("iterating", rf_set_runs(set, next, runs, 16, &count));
        for (size_t i = 0; i < count; i++) {
            next = runs[i].guest_address + runs[i].bytes;
            if (runs[i].guest_address < from + bytes)
                found += (next < from + bytes ? next : from + bytes) - runs[i].guest_address;
        }
    }
    return found == bytes;
}

int main(void) {
    check("this library", rf_check_abi(RF_ABI_MAJOR, RF_ABI_MINOR));
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        fail("opening /dev/kvm");
    int vm = kvm_ioctl("KVM_CREATE_VM", kvm, KVM_CREATE_VM, NULL);

    /* 1. After the VM, before the first vCPU: rings for every vCPU to come. */
    rf_tracker *tracker;
    check("enabling", rf_tracker_enable_or_bitmap(vm, 0, &tracker));
    printf("Ringferry %s tracks by %s\n", rf_version(), rf_tracker_backend(tracker));

    uint8_t *ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram == MAP_FAILED)
        fail("mmap");
    struct kvm_userspace_memory_region region = {.memory_size = RAM_BYTES, .userspace_addr = (uintptr_t)ram};
    kvm_ioctl("KVM_SET_USER_MEMORY_REGION", vm, KVM_SET_USER_MEMORY_REGION, &region);

    /* 2. Each memory slot, once KVM has it. */
    check("adding RAM", rf_tracker_add_slot(tracker, 0, 0, RAM_BYTES, ram, RF_CONTENT_DIRTY));

    load_guest(ram);
    struct vcpu vcpus[VCPUS];
    int run_bytes = kvm_ioctl("KVM_GET_VCPU_MMAP_SIZE", kvm, KVM_GET_VCPU_MMAP_SIZE, NULL);
    for (uint32_t index = 0; index < VCPUS; index++) {
        struct vcpu *vcpu = &vcpus[index];
        vcpu->passes = 0;
        vcpu->fd = ioctl(vm, KVM_CREATE_VCPU, (unsigned long)index);
        if (vcpu->fd < 0)
            fail("KVM_CREATE_VCPU");
        vcpu->run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
        if (vcpu->run == MAP_FAILED)
            fail("mapping kvm_run");
        enter_user_mode(vcpu->fd, index);
        /* 3. Each vCPU, plugged ones too: a handle for its thread, and one for whoever throttles. */
        check("attaching a vCPU", rf_vcpu_attach(tracker, index, vcpu->fd, &vcpu->tracked));
        check("its gate", rf_vcpu_gate(vcpu->tracked, &vcpu->gate));
        if (pthread_create(&vcpu->thread, NULL, run_vcpu, vcpu) != 0)
            fail("pthread_create");
    }

    /* 5. The migration thread: start, observe as often as it likes, harvest once a round. */
    rf_session *session;
    check("starting", rf_session_start(tracker, &session));
    uint64_t before[VCPUS] = {vcpus[0].passes, vcpus[1].passes};
    for (int tries = 0; tries < 5000 && (vcpus[0].passes < before[0] + 2 || vcpus[1].passes < before[1] + 2); tries++)
        sleep_ms(2);
    rf_vcpu_pages observed[VCPUS];
    size_t count;
    check("observing", rf_session_observe(session, observed, VCPUS, &count));
    for (size_t i = 0; i < count; i++)
        printf("observed of vCPU %u: %llu pages\n", observed[i].index, (unsigned long long)observed[i].pages);
    memset(ram + 0x8000, 1, 8); /* a device model's write */
    check("marking", rf_tracker_mark_dirty(tracker, 0x8000, 8));
    rf_set *dirty;
    bool own = false;
    uint64_t pages = 0, throttled = 0;
    check("a set", rf_set_new(&dirty));
    check("harvesting", rf_session_harvest(session, dirty));
    check("counting", rf_set_pages(dirty, &pages));
    check("looking", rf_set_contains(dirty, 0x8000, &own));
    printf("harvested %llu pages; the VMM's own write is in: %s\n", (unsigned long long)pages, own ? "true" : "false");
    for (uint32_t index = 0; index < VCPUS; index++)
        printf("vCPU %u: every page of its working set is in: %s\n", index,
               has_all(dirty, working_set(index), PAGES_PER_VCPU * PAGE) ? "true" : "false");
    /* A vCPU that writes too fast for the link. It comes out by itself, at the end of a pass, so that no kick is needed. */
    for (int tries = 0; tries < 1000 && throttled == 0; tries++) {
        check("throttling", rf_gate_close(vcpus[0].gate, RF_GATE_CLOSED_MAX_US));
        sleep_ms(5);
        check("asking", rf_gate_throttled_ns(vcpus[0].gate, &throttled));
    }
    printf("vCPU 0 was throttled: %s\n", throttled > 0 ? "true" : "false");

    atomic_store(&stop, true);
    for (uint32_t index = 0; index < VCPUS; index++)
        pthread_join(vcpus[index].thread, NULL);
    check("the last harvest", rf_session_harvest_final(session, dirty));
    check("ending", rf_session_end(session));
    for (uint32_t index = 0; index < VCPUS; index++) {
        rf_vcpu_figures figures;
        check("figures", rf_tracker_vcpu_figures(tracker, index, &figures, sizeof figures));
        printf("vCPU %llu: %llu pages, %llu ring-full exits\n", (unsigned long long)figures.index,
               (unsigned long long)figures.pages, (unsigned long long)figures.ring_full_exits);
        rf_gate_free(vcpus[index].gate);
        rf_vcpu_free(vcpus[index].tracked);
        munmap(vcpus[index].run, (size_t)run_bytes);
        close(vcpus[index].fd);
    }
    rf_set_free(dirty);
    check("removing RAM", rf_tracker_remove_slot(tracker, 0));
    rf_tracker_free(tracker);
    munmap(ram, RAM_BYTES);
    return close(vm) | close(kvm);
}
