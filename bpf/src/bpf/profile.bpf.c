// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Counts, per vCPU, what KVM reports as dirty. Nothing here sends an event to user space: it reads the maps when it
 * wants to know. What each tracepoint means is written in kernel-notes/tracepoints.md.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "layout.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define PT_WRITABLE 2 /* the same bit in EPT, NPT and shadow entries */
#define PG_LEVEL_4K 1
#define KVM_EXIT_DIRTY_RING_FULL 31
#define ANON_INODE_FS_MAGIC 0x09041934
#define PAGES_PER_REGION_SHIFT 9

/* Set before loading. */
const volatile struct settings settings = {};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct tally);
} tallies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1);
	__type(key, u64);
	__type(value, struct ring_counts);
} rings SEC(".maps");

/* One per ring, not one per CPU: the vCPU's thread and one that resets take turns. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u64);
	__type(value, struct mark);
} marks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 1024);
	__type(value, struct ended_ring);
} ended SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct thread_counts);
} threads SEC(".maps");

/* Shared by the vCPUs of a VM, hence not per CPU: the page bits must be set once, whoever writes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct region_key);
	__type(value, struct region_counts);
} regions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, TOTALS);
	__type(key, u32);
	__type(value, u64);
} totals SEC(".maps");

static __always_inline void add_to_total(u32 index, u64 count)
{
	u64 *total = bpf_map_lookup_elem(&totals, &index);

	if (total)
		*total += count;
}

/* A VM of another process than the one asked for: its ring gets no entry. */
static __always_inline bool not_wanted(void)
{
	return settings.only_tgid && bpf_get_current_pid_tgid() >> 32 != settings.only_tgid;
}

/* The vCPU that a ring is embedded in. Only for bpf_probe_read_kernel: the verifier does not follow it. */
static __always_inline struct kvm_vcpu *vcpu_of(const void *ring)
{
	return (void *)ring - bpf_core_field_offset(struct kvm_vcpu, dirty_ring);
}

static __noinline int first_sight(u64 ring)
{
	struct kvm_vcpu *vcpu = vcpu_of((void *)ring);
	struct ring_counts counts = {};
	struct kvm *kvm = BPF_CORE_READ(vcpu, kvm);

	counts.kvm = (u64)kvm;
	counts.tgid = bpf_get_current_pid_tgid() >> 32;
	counts.creator = BPF_CORE_READ(kvm, userspace_pid);
	counts.vcpu = BPF_CORE_READ(vcpu, vcpu_id);
	/* Fails if another CPU was faster, which is as good, or if the map is full. */
	return bpf_map_update_elem(&rings, &ring, &counts, BPF_NOEXIST);
}

/* The entry of a ring of a process that is asked for; 0 if there is no room. */
static __always_inline struct ring_counts *counts_of(u64 ring)
{
	struct ring_counts *counts = bpf_map_lookup_elem(&rings, &ring);

	if (counts)
		return counts;
	first_sight(ring);
	return bpf_map_lookup_elem(&rings, &ring);
}

static __always_inline void add_tally(struct ring_counts *counts, const struct tally *tally)
{
	counts->pushes += tally->pushes;
	counts->overwritten += tally->overwritten;
	counts->overflows += tally->overflows;
	if (tally->high_water > counts->high_water)
		counts->high_water = tally->high_water;
}

static long end_on_cpu(u32 cpu, struct ended_ring *sum)
{
	struct ring_counts *counts = bpf_map_lookup_percpu_elem(&rings, &sum->ring, cpu);
	u32 zero = 0;
	struct tally *tally = bpf_map_lookup_percpu_elem(&tallies, &zero, cpu);

	if (tally && tally->ring == sum->ring) {
		add_tally(&sum->counts, tally);
		tally->ring = 0;
	}
	if (!counts)
		return 0;
	sum->counts.pushes += counts->pushes;
	sum->counts.overwritten += counts->overwritten;
	sum->counts.overflows += counts->overflows;
	sum->counts.full_exits += counts->full_exits;
	sum->counts.resets += counts->resets;
	if (counts->high_water > sum->counts.high_water)
		sum->counts.high_water = counts->high_water;
	if (counts->kvm) {
		sum->counts.kvm = counts->kvm;
		sum->counts.tgid = counts->tgid;
		sum->counts.creator = counts->creator;
		sum->counts.vcpu = counts->vcpu;
	}
	return 0;
}

/*
 * The first push of a ring. If there are counts already, then the kernel gave it the memory of a vCPU that is gone, and
 * they belong to that one. (Or the indices wrapped just when everything was recycled: then the counts of one vCPU come in
 * two parts, once in 2^32 pushes.)
 */
static __noinline int new_life(u64 ring)
{
	struct ended_ring sum = { .ring = ring };

	/* Before 5.19 the two lives are counted as one. */
	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_map_lookup_percpu_elem))
		return 0;
	bpf_loop(settings.cpus, end_on_cpu, &sum, 0);
	if (!sum.counts.kvm)
		return 0;
	if (bpf_map_push_elem(&ended, &sum, 0))
		add_to_total(TOTAL_DROPPED_ENDED_PUSHES, sum.counts.pushes);
	return bpf_map_delete_elem(&rings, &ring);
}

/* Makes the tally of this CPU that of `ring`. Leaves it alone if the ring is not to be counted. */
static __noinline int turn_to(u64 ring, bool first_push)
{
	u32 zero = 0;
	struct tally *tally = bpf_map_lookup_elem(&tallies, &zero);
	struct ring_counts *counts;
	u64 old;

	if (!tally || not_wanted())
		return 0;
	if (first_push)
		new_life(ring);
	counts = counts_of(ring);
	if (!counts) {
		add_to_total(TOTAL_DROPPED_PUSHES, 1);
		return 0;
	}
	__sync_fetch_and_add(&tally->sequence, 1);
	old = tally->ring;
	counts = bpf_map_lookup_elem(&rings, &old);
	if (counts)
		add_tally(counts, tally);
	tally->pushes = 0;
	tally->overwritten = 0;
	tally->overflows = 0;
	tally->high_water = 0;
	tally->kvm = (u64)BPF_CORE_READ(vcpu_of((void *)ring), kvm);
	tally->ring = ring;
	__sync_fetch_and_add(&tally->sequence, 1);
	return 1;
}

static __always_inline void count_region(u64 kvm, u32 slot, u64 offset)
{
	struct region_key key = { .kvm = kvm, .slot = slot, .region = offset >> PAGES_PER_REGION_SHIFT };
	u32 page = offset & ((1 << PAGES_PER_REGION_SHIFT) - 1);
	struct region_counts *counts;

	counts = bpf_map_lookup_elem(&regions, &key);
	if (!counts) {
		struct region_counts none = {};

		bpf_map_update_elem(&regions, &key, &none, BPF_NOEXIST);
		counts = bpf_map_lookup_elem(&regions, &key);
		if (!counts) {
			add_to_total(TOTAL_DROPPED_REGION_PUSHES, 1);
			return;
		}
	}
	__sync_fetch_and_add(&counts->pushes, 1);
	__sync_fetch_and_or(&counts->pages[(page >> 6) & 7], 1ULL << (page & 63));
}

/* Counts a push. Returns the VM's address, 0 if the VM is not to be counted. */
static __always_inline u64 count_push(const struct kvm_dirty_ring *ring)
{
	/* Free-running, and this push is already in the first of them. */
	u32 pushed = ring->dirty_index, recycled = ring->reset_index;
	u32 used = pushed - recycled, size = ring->size, zero = 0;
	struct tally *tally = bpf_map_lookup_elem(&tallies, &zero);
	bool first_push = pushed == 1 && recycled == 0;

	if (!tally)
		return 0;
	if ((tally->ring != (u64)ring || first_push) && !turn_to((u64)ring, first_push))
		return 0;
	tally->pushes++;
	if (used > tally->high_water)
		tally->high_water = used;
	if (used > size) {
		tally->overwritten++;
		if (used == size + 1)
			tally->overflows++;
	}
	return tally->kvm;
}

/* One of these two, or none. Not one that asks for its settings: each page of memory touched here costs 25 ns. */
SEC("tp_btf/kvm_dirty_ring_push")
int BPF_PROG(ring_push, struct kvm_dirty_ring *ring, u32 slot, u64 offset)
{
	count_push(ring);
	return 0;
}

SEC("tp_btf/kvm_dirty_ring_push")
int BPF_PROG(ring_push_regions, struct kvm_dirty_ring *ring, u32 slot, u64 offset)
{
	u64 kvm = count_push(ring);

	if (kvm)
		count_region(kvm, slot, offset);
	return 0;
}

/*
 * What the indices tell about the pushes since they were last looked at: each was over a live entry if it was more than
 * the ring's size ahead of the last recycled one. Looked at before every recycling is over, so that all of them were
 * made against the reset index in the mark, but those that a running vCPU makes meanwhile: they find the room that was
 * just made. So it is an overflow if the ring is over its size still, or if all of it was recycled at once; a ring that is
 * nearly full, of a vCPU that runs on, is neither.
 */
static __always_inline void note_indices(u64 address, u32 dirty, u32 reset, u32 size, struct ring_counts *counts)
{
	struct mark *mark = bpf_map_lookup_elem(&marks, &address);
	u32 used, recycled, limit, from;

	if (!mark) {
		struct mark first = { .dirty_index = reset, .reset_index = reset };

		bpf_map_update_elem(&marks, &address, &first, BPF_NOEXIST);
		mark = bpf_map_lookup_elem(&marks, &address);
		if (!mark)
			return;
	}
	if ((s32)(dirty - mark->dirty_index) < 0) {
		/* Indices do not go back: it is the mark of a ring that was here before. */
		mark->dirty_index = reset;
		mark->reset_index = reset;
	}
	if ((s32)(reset - mark->reset_index) < 0)
		/* Another CPU was faster, and has seen a later one. */
		reset = mark->reset_index;
	used = dirty - mark->reset_index;
	recycled = reset - mark->reset_index;
	limit = mark->reset_index + size;
	/* Whoever swaps the mark accounts for the pushes in between. */
	from = __sync_lock_test_and_set(&mark->dirty_index, dirty);
	mark->reset_index = reset;
	if (used > size && dirty - reset <= size && recycled < size)
		used = size;
	if (used > counts->high_water)
		counts->high_water = used;
	if (used <= size || (s32)(dirty - from) <= 0)
		return;
	if ((s32)(from - limit) <= 0) {
		from = limit;
		counts->overflows++;
	}
	counts->overwritten += dirty - from;
}

/* Once per ring that a KVM_RESET_DIRTY_RINGS visits, in the thread that called it. */
SEC("tp_btf/kvm_dirty_ring_reset")
int BPF_PROG(ring_reset, struct kvm_dirty_ring *ring)
{
	struct ring_counts *counts;
	u64 address = (u64)ring;

	/* Nothing was pushed in this ring's life: what it may have counts of is another one. */
	if (ring->dirty_index == 0)
		return 0;
	/* Makes no entry: a VM that is being taken down is still recycled when its vCPUs are closed already. */
	counts = bpf_map_lookup_elem(&rings, &address);
	if (!counts)
		return 0;
	counts->resets++;
	if (settings.by_index)
		note_indices(address, ring->dirty_index, ring->reset_index, ring->size, counts);
	return 0;
}

SEC("tp_btf/kvm_dirty_ring_exit")
int BPF_PROG(ring_full, struct kvm_vcpu *vcpu)
{
	u64 address = (u64)vcpu + bpf_core_field_offset(struct kvm_vcpu, dirty_ring);
	struct ring_counts *counts;

	if (not_wanted())
		return 0;
	counts = counts_of(address);
	if (!counts) {
		add_to_total(TOTAL_DROPPED_FULL_EXITS, 1);
		return 0;
	}
	counts->full_exits++;
	if (settings.by_index)
		note_indices(address, vcpu->dirty_ring.dirty_index, vcpu->dirty_ring.reset_index,
			     vcpu->dirty_ring.size, counts);
	return 0;
}

/* The other end of the same exit: what KVM_RUN really returned. By number, the kernel's names stop at 30. */
SEC("tp_btf/kvm_userspace_exit")
int BPF_PROG(userspace_exit, u32 reason, int error)
{
	if (reason == KVM_EXIT_DIRTY_RING_FULL && error >= 0 && !not_wanted())
		add_to_total(TOTAL_USERSPACE_EXITS_31, 1);
	return 0;
}

/* Only the threads that user space put in the map: vCPUs of VMs whose slots log into bitmaps. */
static __always_inline struct thread_counts *counts_of_this_thread(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	return bpf_map_lookup_elem(&threads, &tid);
}

static __always_inline bool is_writable(const u64 *entry)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), entry);
	return value & PT_WRITABLE;
}

SEC("tp_btf/kvm_mmu_set_spte")
int BPF_PROG(set_spte, int level, u64 gfn, u64 *entry)
{
	struct thread_counts *counts = counts_of_this_thread();

	if (counts && level == PG_LEVEL_4K && is_writable(entry))
		counts->spte_writable++;
	return 0;
}

SEC("tp_btf/fast_page_fault")
int BPF_PROG(fast_fault, struct kvm_vcpu *vcpu, struct kvm_page_fault *fault, u64 *entry, u64 old, int result)
{
	struct thread_counts *counts = counts_of_this_thread();

	if (counts && !(old & PT_WRITABLE) && entry && is_writable(entry))
		counts->fast_fault_writable++;
	return 0;
}

SEC("tp_btf/kvm_pml_full")
int BPF_PROG(pml_full, u32 vcpu_id)
{
	struct thread_counts *counts = counts_of_this_thread();

	if (counts)
		counts->pml_full++;
	return 0;
}

/* ---- the inventory: every VM, vCPU and memory slot behind a file descriptor of some process ---- */

#define SLOT_BUCKETS 128
#define SLOTS_PER_BUCKET 8
/* One process's records must fit the 32 KiB buffer of the iterator. */
#define SLOTS_TOLD_MAX 448

static __always_inline bool starts_with_kvm(const char *name)
{
	return name[0] == 'k' && name[1] == 'v' && name[2] == 'm' && name[3] == '-' && name[4] == 'v';
}

struct slot_walk {
	struct seq_file *seq;
	struct record *record;
	void *heads;
	u32 node_offset;
	u32 told;
};

static long tell_bucket(u32 bucket, struct slot_walk *walk)
{
	struct record *record = walk->record;
	void *link = 0;

	bpf_probe_read_kernel(&link, sizeof(link), walk->heads + bucket * sizeof(link));
	for (int i = 0; i < SLOTS_PER_BUCKET && link; i++) {
		struct kvm_memory_slot *slot = link - walk->node_offset;

		if (walk->told++ >= SLOTS_TOLD_MAX)
			return 1;
		record->slot.base_gfn = BPF_CORE_READ(slot, base_gfn);
		record->slot.pages = BPF_CORE_READ(slot, npages);
		record->slot.address = BPF_CORE_READ(slot, userspace_addr);
		record->slot.flags = BPF_CORE_READ(slot, flags);
		record->slot.slot = (u32)BPF_CORE_READ(slot, as_id) << 16 | (u16)BPF_CORE_READ(slot, id);
		bpf_seq_write(walk->seq, record, sizeof(*record));
		bpf_probe_read_kernel(&link, sizeof(link), link);
	}
	return 0;
}

static __always_inline void tell_slots(struct seq_file *seq, struct record *record, struct kvm *kvm)
{
	struct kvm_memslots *slots = BPF_CORE_READ(kvm, memslots[0]);
	int node = BPF_CORE_READ(slots, node_idx) & 1;
	struct slot_walk walk = {
		.seq = seq,
		.record = record,
		.heads = (void *)slots + bpf_core_field_offset(struct kvm_memslots, id_hash),
		.node_offset = bpf_core_field_offset(struct kvm_memory_slot, id_node) + node * 2 * sizeof(u64),
	};

	record->kind = RECORD_SLOT;
	/* bpf_loop is as old as id_hash (5.17): a kernel without the one does not get here. */
	bpf_loop(SLOT_BUCKETS, tell_bucket, &walk, 0);
}

SEC("iter/task_file")
int inventory(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct record record = {};
	struct kvm_vcpu *vcpu;
	struct kvm *kvm;
	char name[16] = {};

	if (!task || !file)
		return 0;
	/* Only the kernel names files of this file system; anyone can call a file of another one "kvm-vm". */
	if (BPF_CORE_READ(file, f_inode, i_sb, s_magic) != ANON_INODE_FS_MAGIC)
		return 0;
	bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(file, f_path.dentry, d_name.name));
	if (!starts_with_kvm(name))
		return 0;
	record.tgid = BPF_CORE_READ(task, tgid);
	record.fd = ctx->fd;
	if (settings.only_tgid && record.tgid != settings.only_tgid)
		return 0;

	if (name[5] == 'm' && name[6] == 0) {
		kvm = BPF_CORE_READ(file, private_data);
		/* A child that inherited the descriptor cannot run the VM. */
		if (BPF_CORE_READ(kvm, mm) != BPF_CORE_READ(task, mm))
			return 0;
		record.kind = RECORD_VM;
		record.kvm = (u64)kvm;
		record.vm.creator = BPF_CORE_READ(kvm, userspace_pid);
		bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
		if (bpf_core_field_exists(struct kvm_memslots, id_hash))
			tell_slots(ctx->meta->seq, &record, kvm);
	} else if (name[5] == 'c' && name[8] == ':') { /* not "kvm-vcpu-stats:0" */
		vcpu = BPF_CORE_READ(file, private_data);
		kvm = BPF_CORE_READ(vcpu, kvm);
		if (BPF_CORE_READ(kvm, mm) != BPF_CORE_READ(task, mm))
			return 0;
		record.kind = RECORD_VCPU;
		record.kvm = (u64)kvm;
		record.vcpu.ring = (u64)vcpu + bpf_core_field_offset(struct kvm_vcpu, dirty_ring);
		record.vcpu.vcpu = BPF_CORE_READ(vcpu, vcpu_id);
		record.vcpu.tid = BPF_CORE_READ(vcpu, pid, numbers[0].nr);
		/* In this order: a reset index that is read later may be beyond the dirty one. */
		record.vcpu.reset_index = BPF_CORE_READ(vcpu, dirty_ring.reset_index);
		record.vcpu.dirty_index = BPF_CORE_READ(vcpu, dirty_ring.dirty_index);
		record.vcpu.ring_entries = BPF_CORE_READ(kvm, dirty_ring_size) ? BPF_CORE_READ(vcpu, dirty_ring.size) : 0;
		record.vcpu.creator = BPF_CORE_READ(kvm, userspace_pid);
		bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	}
	return 0;
}
