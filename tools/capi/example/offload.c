/*
 * A VMM of one vCPU in C whose guest is migrated by a process beside it: `ringferry offload send` at the source, `ringferry
 * offload receive` at the destination. guest.h has the guest.
 *
 * What offload adds is numbered; everything else is what any VMM does. The vCPU's thread is the same as without offload.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest.h"

struct vmm {
    int kvm, vm, fd, ram_file, run_bytes;
    uint8_t *ram;
    struct kvm_run *run;
    rf_tracker *tracker;
    rf_vcpu *tracked;
    rf_gate *gate;
    pthread_t thread;
    atomic_bool stop, runs;
    rf_cancel *cancel;
    const char *mode;
    rf_lent_region lent_ram;
};

static void *run_vcpu(void *argument) {
    struct vmm *vmm = argument;
    while (!atomic_load(&vmm->stop)) {
        if (rf_vcpu_before_run(vmm->tracked) != RF_OK)
            continue;
        if (ioctl(vmm->fd, KVM_RUN, 0) < 0 && errno != EINTR)
            fail("KVM_RUN");
        if (vmm->run->exit_reason == RF_EXIT_DIRTY_RING_FULL)
            check("recycling a full ring", rf_vcpu_ring_full(vmm->tracked));
        else if (vmm->run->exit_reason != KVM_EXIT_IO && vmm->run->exit_reason != KVM_EXIT_INTR)
            fail("an unexpected exit");
    }
    return NULL;
}

/* A VM that has not run: a destination, or what load_guest() makes a guest of. */
static void create(struct vmm *vmm) {
    vmm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vmm->vm = kvm_ioctl("KVM_CREATE_VM", vmm->kvm, KVM_CREATE_VM, NULL);
    check("enabling", rf_tracker_enable(vmm->vm, 0, &vmm->tracker));
    vmm->ram_file = memfd_create("example-ram", MFD_CLOEXEC);
    if (vmm->ram_file < 0 || ftruncate(vmm->ram_file, RAM_BYTES) < 0)
        fail("a memfd for RAM");
    vmm->ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vmm->ram_file, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = RAM_BYTES, .userspace_addr = (uintptr_t)vmm->ram};
    kvm_ioctl("KVM_SET_USER_MEMORY_REGION", vmm->vm, KVM_SET_USER_MEMORY_REGION, &slot);
    check("adding RAM", rf_tracker_add_slot(vmm->tracker, 0, 0, RAM_BYTES, vmm->ram, RF_CONTENT_DIRTY));
    vmm->fd = ioctl(vmm->vm, KVM_CREATE_VCPU, 0UL);
    vmm->run_bytes = kvm_ioctl("KVM_GET_VCPU_MMAP_SIZE", vmm->kvm, KVM_GET_VCPU_MMAP_SIZE, NULL);
    vmm->run = mmap(NULL, (size_t)vmm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vmm->fd, 0);
    check("attaching a vCPU", rf_vcpu_attach(vmm->tracker, 0, vmm->fd, &vmm->tracked));
    check("its gate", rf_vcpu_gate(vmm->tracked, &vmm->gate));
    /* 1. Guest memory as it is lent: a memfd for each slot. */
    vmm->lent_ram = (rf_lent_region){.slot = 0, .fd = vmm->ram_file, .bytes = RAM_BYTES};
}

/* 2. What a migration asks of any VMM. NULL is yes. */
static const char *pause_vm(void *context) {
    struct vmm *vmm = context;
    if (!atomic_exchange(&vmm->runs, false))
        return NULL;
    atomic_store(&vmm->stop, true);
    check("opening the gate", rf_gate_open(vmm->gate));
    pthread_join(vmm->thread, NULL); /* the guest comes back after each pass, so that no kick is needed */
    vmm->run->immediate_exit = 1;    /* KVM completes the guest's port write, and does not enter it */
    ioctl(vmm->fd, KVM_RUN, 0);
    vmm->run->immediate_exit = 0;
    return NULL;
}

static const char *resume_vm(void *context) {
    struct vmm *vmm = context;
    atomic_store(&vmm->stop, false);
    if (pthread_create(&vmm->thread, NULL, run_vcpu, vmm) != 0)
        return "no thread for the vCPU";
    atomic_store(&vmm->runs, true);
    return NULL;
}

static void kick(void *context, uint32_t index) {
    (void)context, (void)index; /* as above */
}

struct state {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
};

static const char *save_state(void *context, rf_state_out *out) {
    struct vmm *vmm = context;
    struct state state;
    if (strcmp(vmm->mode, "refuse") == 0)
        return "the example was told to refuse";
    if (strcmp(vmm->mode, "cancel") == 0)
        check("cancelling", rf_cancel_set(vmm->cancel));
    kvm_ioctl("KVM_GET_REGS", vmm->fd, KVM_GET_REGS, &state.regs);
    kvm_ioctl("KVM_GET_SREGS", vmm->fd, KVM_GET_SREGS, &state.sregs);
    return rf_state_write(out, &state, sizeof state) < 0 ? rf_last_error() : NULL;
}

static const char *restore_state(void *context, const uint8_t *bytes, size_t count) {
    struct vmm *vmm = context;
    struct state state;
    if (count != sizeof state)
        return "the state is another VMM's";
    memcpy(&state, bytes, sizeof state);
    kvm_ioctl("KVM_SET_SREGS", vmm->fd, KVM_SET_SREGS, &state.sregs);
    kvm_ioctl("KVM_SET_REGS", vmm->fd, KVM_SET_REGS, &state.regs);
    return NULL;
}

static const char *build(void *context, const rf_offer *offer, const rf_lent_region **memory, size_t *count) {
    struct vmm *vmm = context;
    if (offer->vcpus != 1 || offer->ram_count != 1 || offer->ram[0].guest_address != 0 || offer->ram[0].bytes != RAM_BYTES)
        return "this is no VM of the example's";
    create(vmm);
    *memory = &vmm->lent_ram;
    *count = 1;
    return NULL;
}

/* 3. A process beside this one connects. */
static int accept_on(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    umask(077); /* whoever connects is given all of guest memory */
    if (bind(listening, (struct sockaddr *)&address, sizeof address) < 0 || listen(listening, 1) < 0)
        fail("listening");
    puts("waiting");
    fflush(stdout);
    int connection = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
    close(listening);
    return connection;
}

/* Whether the guest goes on, and whether each of its pages has the number of the last pass or of the one before. */
static void look(struct vmm *vmm) {
    volatile uint64_t *first = (volatile uint64_t *)(vmm->ram + working_set(0));
    uint64_t before = *first;
    bool whole = true;
    for (int tries = 0; tries < 2000 && *first < before + 2; tries++)
        sleep_ms(1);
    bool goes_on = *first >= before + 2;
    pause_vm(vmm);
    for (uint64_t page = 0; page < PAGES_PER_VCPU; page++)
        whole = whole && *first - first[page * (PAGE / 8)] <= 1;
    printf("goes on: %s; whole: %s\n", goes_on ? "true" : "false", whole ? "true" : "false");
}

int main(int argc, char **argv) {
    static struct vmm vmm;
    rf_vm asked = {.context = &vmm, .pause = pause_vm, .resume = resume_vm, .kick = kick, .save_state = save_state, .restore_state = restore_state};
    if (argc != 3) {
        fprintf(stderr, "usage: offload source|cancel|refuse|destination SOCKET\n");
        return 2;
    }
    vmm.mode = argv[1];
    check("this library", rf_check_abi(RF_ABI_MAJOR, RF_ABI_MINOR));
    check("a way to cancel", rf_cancel_new(&vmm.cancel));
    if (strcmp(vmm.mode, "destination") == 0) {
        /* 4. The destination builds the VM that comes, and is given its state. */
        check("receiving", rf_offload_receive(accept_on(argv[2]), &asked, sizeof asked, build, vmm.cancel));
        look(&vmm);
    } else {
        create(&vmm);
        load_guest(vmm.ram);
        enter_user_mode(vmm.fd, 0);
        resume_vm(&vmm);
        /* 5. The source lends its VM to whoever comes. */
        rf_lent_vcpu vcpu = {.index = 0, .fd = vmm.fd};
        rf_lent lent = {.memory = &vmm.lent_ram, .memory_count = 1, .vcpus = &vcpu, .vcpu_count = 1};
        rf_offload_outcome outcome;
        rf_status status = rf_offload_lend(vmm.tracker, accept_on(argv[2]), &asked, sizeof asked, &lent, vmm.cancel, &outcome);
        if (status < 0)
            printf("%s: %s\n", rf_status_name(status), rf_last_error());
        else if (outcome.end == RF_OFFLOAD_END_MOVED)
            puts("moved");
        else
            printf("%s: %s\n", outcome.end == RF_OFFLOAD_END_STAYS ? "stays" : "somebody has to look", outcome.why);
        if (status < 0 || outcome.end == RF_OFFLOAD_END_STAYS)
            look(&vmm);
    }
    rf_cancel_free(vmm.cancel);
    rf_gate_free(vmm.gate);
    rf_vcpu_free(vmm.tracked);
    check("removing RAM", rf_tracker_remove_slot(vmm.tracker, 0));
    rf_tracker_free(vmm.tracker);
    munmap(vmm.run, (size_t)vmm.run_bytes);
    munmap(vmm.ram, RAM_BYTES);
    return close(vmm.fd) | close(vmm.ram_file) | close(vmm.vm) | close(vmm.kvm);
}
