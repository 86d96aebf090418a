//! One JSON object per line, and the same rows as CSV. Field names carry their units; `null` is "not known".

use std::io::{self, Write};
use std::time::Duration;

use ringferry_bpf::{Look, PAGE_BYTES, Row, Session, VmLook};
use serde::Serialize;

use super::Choice;
use crate::chosen;

/// At most this many regions per VM and look.
const REGIONS_MAX: usize = 32;

/// A vCPU during one interval; the counts are those of the interval.
#[derive(Serialize, Debug)]
struct VcpuRate<'a> {
    kind: &'static str,
    t_ms: u64,
    pid: u32,
    vm: &'a str,
    vcpu: Option<u32>,
    tid: Option<u32>,
    source: &'static str,
    dirty_pages: Option<u64>,
    dirty_pages_per_s: Option<f64>,
    dirty_bytes_per_s: Option<u64>,
    ring_used: Option<u32>,
    ring_size: Option<u32>,
    ring_full_exits: Option<u64>,
    overflows: Option<u64>,
}

#[derive(Serialize, Debug)]
struct VmEstimate<'a> {
    kind: &'static str,
    t_ms: u64,
    pid: u32,
    vm: &'a str,
    source: &'static str,
    dirty_pages_per_s: Option<f64>,
    dirty_bytes_per_s: Option<u64>,
    low_95_pages_per_s: Option<f64>,
    high_95_pages_per_s: Option<f64>,
    sampled_pages: Option<u64>,
    error: Option<&'a str>,
}

#[derive(Serialize, Debug)]
struct VmRegions<'a> {
    kind: &'static str,
    t_ms: u64,
    pid: u32,
    vm: &'a str,
    unique_pages: u64,
    unique_bytes: u64,
    pushed_pages: u64,
    hottest: Vec<HotRegion>,
}

#[derive(Serialize, Debug)]
struct HotRegion {
    address: u64,
    unique_pages: u64,
    pushed_pages: u64,
}

/// A vCPU over the whole session; the counts are those since the attach.
#[derive(Serialize, Debug)]
struct VcpuSummary<'a> {
    kind: &'static str,
    pid: u32,
    vm: &'a str,
    vm_creator_tid: u32,
    vcpu: u32,
    source: &'static str,
    observed_ms: u64,
    dirty_pages: Option<u64>,
    average_pages_per_s: Option<f64>,
    most_pages_per_s: f64,
    ring_size: Option<u32>,
    ring_high_water: Option<u32>,
    ring_full_exits: u64,
    ring_resets: u64,
    overflows: u64,
    overwritten_entries: u64,
    ended: bool,
}

pub(super) fn attached(out: &mut impl Write, session: &Session) -> anyhow::Result<()> {
    let sources = session.profiler().sources();
    let line = serde_json::json!({
        "kind": "profiler_attached",
        "set_spte": sources.set_spte,
        "fast_page_fault": sources.fast_fault,
        "pml_full": sources.pml_full,
        "map_bytes_max": session.profiler().map_bytes()?,
    });
    Ok(writeln!(out, "{line}")?)
}

pub(super) fn look(out: &mut impl Write, look: &Look, choice: Choice) -> io::Result<()> {
    let t_ms = milliseconds(look.time);
    for row in chosen(look, choice).0 {
        line(out, &VcpuRate::of(row, t_ms))?;
    }
    for vm in &look.vms {
        if let Some(estimate) = VmEstimate::of(vm, t_ms) {
            line(out, &estimate)?;
        }
        if let Some(regions) = VmRegions::of(vm, t_ms) {
            line(out, &regions)?;
        }
    }
    Ok(())
}

pub(super) fn summary(out: &mut impl Write, session: &Session, choice: Choice) -> anyhow::Result<()> {
    let (vcpus, left_out) = session.summary();
    for summary in vcpus.iter().filter(|summary| choice.vcpu.is_none_or(|vcpu| vcpu == summary.row.vcpu)) {
        let row = &summary.row;
        let text = VcpuSummary {
            kind: "vcpu_dirty_summary",
            pid: row.pid,
            vm: &row.vm,
            vm_creator_tid: summary.creator_tid,
            vcpu: row.vcpu,
            source: row.source.name(),
            observed_ms: milliseconds(summary.observed),
            dirty_pages: row.dirty_pages,
            average_pages_per_s: row.average_pages_per_s.map(tenth),
            most_pages_per_s: tenth(summary.most_pages_per_s),
            ring_size: row.ring.map(|ring| ring.size),
            ring_high_water: row.ring.map(|ring| ring.high_water),
            ring_full_exits: row.ring_full_exits,
            ring_resets: row.resets,
            overflows: row.overflows,
            overwritten_entries: row.overwritten,
            ended: row.ended,
        };
        line(out, &text)?;
    }
    let totals = session.profiler().totals()?;
    let text = serde_json::json!({
        "kind": "profiler_summary",
        "dropped_pushes": totals.dropped_pushes,
        "dropped_ring_full_exits": totals.dropped_ring_full_exits,
        "dropped_region_pushes": totals.dropped_region_pushes,
        "userspace_exits_31": totals.userspace_exits_31,
        "ended_vcpus_left_out": left_out,
    });
    Ok(writeln!(out, "{text}")?)
}

const CSV_HEADER: &str = "t_ms,pid,vm,vcpu,tid,source,dirty_pages,dirty_pages_per_s,dirty_bytes_per_s,\
ring_used,ring_size,ring_full_exits,overflows";

pub(super) fn csv_header(out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{CSV_HEADER}")
}

pub(super) fn csv_look(out: &mut impl Write, look: &Look, choice: Choice) -> io::Result<()> {
    let t_ms = milliseconds(look.time);
    let rows = chosen(look, choice).0;
    let estimates = look.vms.iter().filter_map(|vm| VcpuRate::of_estimate(vm, t_ms));
    for row in rows.into_iter().map(|row| VcpuRate::of(row, t_ms)).chain(estimates) {
        writeln!(
            out,
            "{},{},{},{},{},{},{},{},{},{},{},{},{}",
            row.t_ms,
            row.pid,
            quoted(row.vm),
            or_empty(row.vcpu),
            or_empty(row.tid),
            row.source,
            or_empty(row.dirty_pages),
            or_empty(row.dirty_pages_per_s),
            or_empty(row.dirty_bytes_per_s),
            or_empty(row.ring_used),
            or_empty(row.ring_size),
            or_empty(row.ring_full_exits),
            or_empty(row.overflows)
        )?;
    }
    Ok(())
}

impl<'a> VcpuRate<'a> {
    fn of(row: &'a Row, t_ms: u64) -> Self {
        Self {
            kind: "vcpu_dirty_rate",
            t_ms,
            pid: row.pid,
            vm: &row.vm,
            vcpu: Some(row.vcpu),
            tid: row.tid,
            source: row.source.name(),
            dirty_pages: row.dirty_pages,
            dirty_pages_per_s: row.dirty_pages_per_s.map(tenth),
            dirty_bytes_per_s: row.dirty_pages_per_s.map(bytes),
            ring_used: row.ring.map(|ring| ring.used),
            ring_size: row.ring.map(|ring| ring.size),
            ring_full_exits: row.ring.map(|_| row.ring_full_exits),
            overflows: row.ring.map(|_| row.overflows),
        }
    }

    /// The row of a sampled VM: of no vCPU in particular.
    fn of_estimate(vm: &'a VmLook, t_ms: u64) -> Option<Self> {
        let estimate = vm.estimate.as_ref()?.as_ref().ok()?;
        let rate = estimate.dirty_pages / estimate.interval.as_secs_f64();
        Some(Self {
            kind: "vm_dirty_rate",
            t_ms,
            pid: vm.vm.pid,
            vm: &vm.name,
            vcpu: None,
            tid: None,
            source: "page_sampling",
            dirty_pages: Some(rounded(estimate.dirty_pages)),
            dirty_pages_per_s: Some(tenth(rate)),
            dirty_bytes_per_s: Some(bytes(rate)),
            ring_used: None,
            ring_size: None,
            ring_full_exits: None,
            overflows: None,
        })
    }
}

impl<'a> VmEstimate<'a> {
    fn of(vm: &'a VmLook, t_ms: u64) -> Option<Self> {
        let result = vm.estimate.as_ref()?;
        let estimate = result.as_ref().ok();
        let rate = |pages: f64, interval: Duration| tenth(pages / interval.as_secs_f64());
        Some(Self {
            kind: "vm_dirty_rate",
            t_ms,
            pid: vm.vm.pid,
            vm: &vm.name,
            source: "page_sampling",
            dirty_pages_per_s: estimate.map(|e| rate(e.dirty_pages, e.interval)),
            dirty_bytes_per_s: estimate.map(|e| bytes(e.dirty_pages / e.interval.as_secs_f64())),
            low_95_pages_per_s: estimate.map(|e| rate(e.dirty_pages_low, e.interval)),
            high_95_pages_per_s: estimate.map(|e| rate(e.dirty_pages_high, e.interval)),
            sampled_pages: estimate.map(|e| e.sampled_pages),
            error: result.as_ref().err().map(String::as_str),
        })
    }
}

impl<'a> VmRegions<'a> {
    fn of(vm: &'a VmLook, t_ms: u64) -> Option<Self> {
        let set = vm.working_set.as_ref()?;
        let hottest = set.hottest(REGIONS_MAX).into_iter().map(|region| HotRegion {
            address: region.first_page * PAGE_BYTES,
            unique_pages: region.unique_pages,
            pushed_pages: region.pushes,
        });
        Some(Self {
            kind: "vm_regions",
            t_ms,
            pid: vm.vm.pid,
            vm: &vm.name,
            unique_pages: set.unique_pages,
            unique_bytes: set.unique_pages * PAGE_BYTES,
            pushed_pages: set.pushes,
            hottest: hottest.collect(),
        })
    }
}

fn line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    writeln!(out)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn bytes(pages: f64) -> u64 {
    rounded(pages * PAGE_BYTES as f64)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and a count is not negative"
)]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}

fn or_empty(value: Option<impl ToString>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

/// RFC 4180: quotes around a field that needs them, and doubled inside.
fn quoted(field: &str) -> String {
    if field.contains([',', '"']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.to_owned() }
}
