/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/* What the programs and user space exchange. src/layout.rs declares the same in Rust; both assert the sizes. */
#ifndef RINGFERRY_LAYOUT_H
#define RINGFERRY_LAYOUT_H

/* The whole of .rodata. */
struct settings {
	/* 0: every VM. */
	u32 only_tgid;
	/* Overflows and high-water marks are found from the indices, because no program runs at each push. */
	u32 by_index;
	u32 cpus;
};

/*
 * The ring that a CPU pushed to last, and what it pushed since: one place to touch per push. It is added to the ring's
 * own counts when the CPU pushes to another one. Key: 0.
 */
struct tally {
	u64 ring;
	u64 kvm;
	u64 pushes;
	/* Pushes over an entry that was not recycled yet: that many entries are gone. */
	u64 overwritten;
	/* How often the ring went from "not more than full" to "overwriting". */
	u64 overflows;
	/* The most entries in use. */
	u32 high_water;
	/* Odd while the tally is being added to the ring's counts. */
	u32 sequence;
};

/* Of one ring, by one CPU. Key: the address of the kernel's struct kvm_dirty_ring. */
struct ring_counts {
	u64 pushes;
	u64 overwritten;
	u64 overflows;
	u64 full_exits;
	u64 resets;
	/* Who it is: written once, by the CPU that made the entry, else 0. */
	u64 kvm;
	u32 tgid;
	u32 creator;
	u32 vcpu;
	u32 high_water;
};

/* The indices of a ring when they were last looked at. */
struct mark {
	u32 dirty_index;
	u32 reset_index;
};

/* What was counted for a ring whose address a new ring has taken: the sum over all CPUs. */
struct ended_ring {
	u64 ring;
	struct ring_counts counts;
};

/* Of one vCPU thread of a VM that logs into bitmaps, by one CPU. Key: thread id. */
struct thread_counts {
	u64 spte_writable;
	u64 fast_fault_writable;
	u64 pml_full;
};

/* The pages of one region that were pushed since user space last took the entry away. */
struct region_key {
	u64 kvm;
	/* As in a ring entry: address space << 16 | slot id. */
	u32 slot;
	/* Page offset in the slot / 512. */
	u32 region;
};

struct region_counts {
	u64 pushes;
	u64 pages[8];
};

/* Indices of `totals`. */
enum {
	TOTAL_DROPPED_PUSHES,
	TOTAL_DROPPED_REGION_PUSHES,
	TOTAL_DROPPED_ENDED_PUSHES,
	TOTAL_DROPPED_FULL_EXITS,
	TOTAL_USERSPACE_EXITS_31,
	TOTALS
};

enum { RECORD_VM = 1, RECORD_VCPU = 2, RECORD_SLOT = 3 };

/* One line of the inventory: a VM, a vCPU or a memory slot. */
struct record {
	u32 kind;
	u32 tgid;
	u32 fd;
	u32 pad;
	u64 kvm;
	union {
		struct {
			u32 creator;
		} vm;
		struct {
			u64 ring;
			u32 vcpu;
			u32 tid;
			u32 dirty_index;
			u32 reset_index;
			u32 ring_entries;
			u32 creator;
		} vcpu;
		struct {
			u64 base_gfn;
			u64 pages;
			u64 address;
			u32 flags;
			u32 slot;
		} slot;
	};
};

_Static_assert(sizeof(struct settings) == 12, "as in src/layout.rs");
_Static_assert(sizeof(struct tally) == 48, "as in src/layout.rs");
_Static_assert(sizeof(struct ring_counts) == 64, "as in src/layout.rs");
_Static_assert(sizeof(struct ended_ring) == 72, "as in src/layout.rs");
_Static_assert(sizeof(struct thread_counts) == 24, "as in src/layout.rs");
_Static_assert(sizeof(struct region_key) == 16, "as in src/layout.rs");
_Static_assert(sizeof(struct region_counts) == 72, "as in src/layout.rs");
_Static_assert(sizeof(struct record) == 56, "as in src/layout.rs");

#endif
