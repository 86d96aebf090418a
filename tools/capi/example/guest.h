/* The guest of the examples: a few bytes of user-mode code per vCPU that write one word to every page of a range, for ever. */
#include <errno.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include "ringferry.h"

#define PAGE 4096ULL
#define RAM_BYTES (64ULL << 20)
/* Each vCPU writes this many pages, from its own address on. */
#define PAGES_PER_VCPU 1024ULL
#define CODE 0x1000ULL
#define PAGE_TABLES 0x10000ULL

static uint64_t working_set(uint32_t vcpu) {
    return (16ULL << 20) + vcpu * (16ULL << 20);
}

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static void check(const char *what, rf_status status) {
    if (status < 0) {
        fprintf(stderr, "%s: %s: %s\n", what, rf_status_name(status), rf_last_error());
        exit(1);
    }
}

static int kvm_ioctl(const char *what, int fd, unsigned long request, void *argument) {
    int answer = ioctl(fd, request, argument);
    if (answer < 0)
        fail(what);
    return answer;
}

/* The guest: page tables that map RAM to itself for user mode, and a loop. */
static void load_guest(uint8_t *ram) {
    static const uint8_t code[] = {
        0x48, 0x89, 0xf7,                         /* mov rdi, rsi */
        0x48, 0x89, 0xd1,                         /* mov rcx, rdx */
        0x48, 0x89, 0x07,                         /* mov [rdi], rax */
        0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, /* add rdi, 4096 */
        0x48, 0xff, 0xc9,                         /* dec rcx */
        0x75, 0xf1,                               /* jnz to mov [rdi] */
        0x48, 0xff, 0xc0,                         /* inc rax */
        0xe6, 0x10,                               /* out 0x10, al */
        0xeb, 0xe4,                               /* jmp to the first line */
    };
    const uint64_t user = 7, large_page = 0x80;
    uint64_t *tables = (uint64_t *)(ram + PAGE_TABLES);
    memcpy(ram + CODE, code, sizeof code);
    tables[0] = (PAGE_TABLES + 0x1000) | user;
    tables[0x1000 / 8] = (PAGE_TABLES + 0x2000) | user;
    for (uint64_t entry = 0; entry < RAM_BYTES >> 21; entry++)
        tables[0x2000 / 8 + entry] = entry << 21 | large_page | user;
}

/* 64-bit user mode, which runs natively under every KVM. */
static void enter_user_mode(int fd, uint32_t index) {
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = CODE, .rflags = 0x3002, .rax = 1};
    struct kvm_segment code = {.limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {.limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1};
    memset(&sregs, 0, sizeof sregs);
    kvm_ioctl("KVM_GET_SREGS", fd, KVM_GET_SREGS, &sregs);
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 = 0x80050033;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x620;
    sregs.efer = 0xd01;
    kvm_ioctl("KVM_SET_SREGS", fd, KVM_SET_SREGS, &sregs);
    regs.rsi = working_set(index);
    regs.rdx = PAGES_PER_VCPU;
    kvm_ioctl("KVM_SET_REGS", fd, KVM_SET_REGS, &regs);
}

static void sleep_ms(long ms) {
    struct timespec time = {.tv_nsec = ms * 1000000};
    nanosleep(&time, NULL);
}
