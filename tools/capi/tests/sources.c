/* Writers that KVM does not see, reported by a log of the VMM's own and by one that another process marks. Exits 0 if every page is
 * harvested once, by whatever way it came. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ringferry.h"

#define SLOT_BYTES (1ULL << 20)
#define CHECK(what) do { if (!(what)) { fprintf(stderr, "line %d: %s: %s\n", __LINE__, #what, rf_last_error()); return 1; } } while (0)

/* What a device of the VMM's has written. */
struct device {
    bool fails, logging;
    uint64_t page;
    const rf_marks *kept;
};

static const char *start(void *context) {
    struct device *device = context;
    device->logging = !device->fails;
    return device->fails ? "the device is gone" : NULL;
}

static void drain(void *context, const rf_marks *marks) {
    struct device *device = context;
    if (device->page != 0)
        rf_marks_add(marks, device->page, 1);
    device->page = 0;
    device->kept = marks;
}

static void stop(void *context) {
    ((struct device *)context)->logging = false;
}

/* The other process: it has the log's descriptor and nothing else of the tracker. */
static int writes(int fd) {
    rf_log_writer *writer = NULL;
    CHECK(rf_log_writer_open(fd, &writer) == RF_OK);
    CHECK(rf_log_writer_mark(writer, 0x7fff, 2) == RF_OK);
    CHECK(rf_log_writer_mark(writer, UINT64_MAX, UINT64_MAX) == RF_OK);
    CHECK(rf_log_writer_free(writer) == RF_OK);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2)
        return writes(atoi(argv[1]));
    int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0), fd = -1, status = 1;
    uint8_t *ram = mmap(NULL, SLOT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {.memory_size = SLOT_BYTES, .userspace_addr = (uintptr_t)ram};
    CHECK(vm >= 0 && ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    rf_tracker *tracker = NULL;
    rf_session *session = NULL;
    rf_set *set = NULL;
    rf_log *log = NULL;
    rf_log_writer *writer = NULL;
    uint64_t of_device, of_log, pages = 0;
    CHECK(rf_tracker_enable_or_bitmap(vm, 1024, &tracker) == RF_OK);
    CHECK(rf_tracker_add_slot(tracker, 0, 0, SLOT_BYTES, ram, RF_CONTENT_CLEAN) == RF_OK);
    CHECK(rf_set_new(&set) == RF_OK);

    /* What is wrong is said. */
    struct device device = {.fails = true};
    rf_source source = {.context = &device, .start = start, .stop = stop};
    CHECK(rf_tracker_add_source(tracker, NULL, &of_device) == RF_NULL);
    CHECK(rf_tracker_add_source(tracker, &source, &of_device) == RF_NULL && strstr(rf_last_error(), "drain") != NULL);
    CHECK(rf_tracker_remove_source(tracker, 0) == RF_ARGUMENT);
    CHECK(rf_log_create(1, SLOT_BYTES, &log) == RF_ARGUMENT);
    CHECK(rf_log_writer_open(-1, &writer) == RF_ARGUMENT);
    CHECK(rf_log_writer_open(kvm, &writer) < 0 && writer == NULL);
    CHECK(rf_log_fd((const rf_log *)tracker, &fd) == RF_WRONG_HANDLE);

    source.drain = drain;
    CHECK(rf_tracker_add_source(tracker, &source, &of_device) == RF_OK);
    CHECK(rf_log_create(0, SLOT_BYTES, &log) == RF_OK && rf_log_fd(log, &fd) == RF_OK);
    CHECK(rf_tracker_add_log(tracker, log, &of_log) == RF_OK && of_log != of_device);
    CHECK(rf_session_start(tracker, &session) < 0 && strstr(rf_last_error(), "the device is gone") != NULL);
    device.fails = false;
    CHECK(rf_session_start(tracker, &session) == RF_OK && device.logging);

    char passed[16];
    snprintf(passed, sizeof passed, "%d", fcntl(fd, F_DUPFD, 3));
    pid_t child = fork();
    if (child == 0) {
        execl(argv[0], argv[0], passed, (char *)NULL);
        _exit(2);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    device.page = 0x42000;
    CHECK(rf_session_harvest(session, set) == RF_OK && rf_set_pages(set, &pages) == RF_OK);
    CHECK(pages == 3);
    for (uint64_t at = 0x7000; at <= 0x42000; at += at == 0x8000 ? 0x3a000 : 0x1000) {
        bool contained = false;
        CHECK(rf_set_contains(set, at, &contained) == RF_OK && contained);
    }
    CHECK(rf_set_clear(set) == RF_OK && rf_session_harvest(session, set) == RF_OK);
    CHECK(rf_set_pages(set, &pages) == RF_OK && pages == 0);

    /* What was logged when a source goes stays dirty; a second time there is nothing to take out. */
    device.page = 0x9000;
    CHECK(rf_tracker_remove_source(tracker, of_device) == RF_OK && !device.logging);
    CHECK(rf_tracker_remove_source(tracker, of_device) == RF_ARGUMENT);
    CHECK(rf_log_free(log) == RF_OK && rf_tracker_remove_source(tracker, of_log) == RF_OK);
    CHECK(rf_session_harvest(session, set) == RF_OK && rf_set_pages(set, &pages) == RF_OK && pages == 1);

    CHECK(rf_session_end(session) == RF_OK && rf_tracker_free(tracker) == RF_OK && rf_set_free(set) == RF_OK);
    close(vm);
    close(kvm);
    munmap(ram, SLOT_BYTES);
    puts("every page came once");
    return 0;
}
