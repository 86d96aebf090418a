//! Lines of text, in the manner of vmstat: a header now and then, one line per vCPU and interval, a summary.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use ringferry_bpf::{Look, Session, VmLook};

use super::columns::not_counted;
use super::{COLUMNS, Choice, mib};
use crate::chosen;

/// The header comes again after this many lines.
const LINES_PER_HEADER: usize = 20;
const STRIP_CELLS: usize = 64;

const ALARM: Style = AnsiColor::Red.on_default().bold();

#[derive(Debug, Default)]
pub(super) struct Plain {
    lines: usize,
}

impl Plain {
    pub(super) fn look(&mut self, out: &mut impl Write, look: &Look, choice: Choice) -> io::Result<()> {
        let (rows, left_out) = chosen(look, choice);
        if self.lines == 0 || self.lines >= LINES_PER_HEADER {
            let titles: Vec<String> = COLUMNS.iter().map(|column| column.padded(column.title)).collect();
            writeln!(out, "{:>7} {}", "TIME", titles.join(" ").trim_end())?;
            self.lines = 1;
        }
        let time = format!("{:>6.1}s", look.time.as_secs_f64());
        if rows.is_empty() {
            writeln!(out, "{time} no VM")?;
            self.lines += 1;
        }
        for row in rows {
            let cells: Vec<String> =
                COLUMNS.iter().map(|column| column.padded(&(column.cell)(row, look.interval))).collect();
            let style = if row.overflows_so_far > 0 { ALARM } else { Style::new() };
            writeln!(out, "{style}{time} {}{style:#}", cells.join(" ").trim_end())?;
            self.lines += 1;
        }
        if left_out > 0 {
            writeln!(out, "{time} and {left_out} more")?;
            self.lines += 1;
        }
        for vm in &look.vms {
            for line in region_lines(vm, STRIP_CELLS).into_iter().chain(sampling_line(vm)) {
                writeln!(out, "{time} {line}")?;
                self.lines += 1;
            }
        }
        Ok(())
    }
}

/// The heat strip of a VM, and its unique working set.
pub(crate) fn region_lines(vm: &VmLook, cells: usize) -> Vec<String> {
    let Some(set) = &vm.working_set else { return Vec::new() };
    let hottest: Vec<String> = set
        .hottest(3)
        .iter()
        .map(|region| format!("{:#x} ({} pushes)", u128::from(region.first_page) * 4096, region.pushes))
        .collect();
    vec![
        format!("{:>7} {:<16} writes |{}|", vm.vm.pid, vm.name, set.strip(&vm.vm, cells)),
        format!(
            "{:>7} {:<16} {} unique pages ({:.1} MiB) in {} pushes; hottest: {}",
            "",
            "",
            set.unique_pages,
            mib(set.unique_pages as f64),
            set.pushes,
            hottest.join(", ")
        ),
    ]
}

pub(crate) fn sampling_line(vm: &VmLook) -> Option<String> {
    let text = match vm.estimate.as_ref()? {
        Ok(estimate) => {
            let seconds = estimate.interval.as_secs_f64();
            format!(
                "all vCPUs: {:.0} pages/s ({:.1} MiB/s), 95 % within {:.0} to {:.0}, by sampling {} pages",
                estimate.dirty_pages / seconds,
                mib(estimate.dirty_pages / seconds),
                estimate.dirty_pages_low / seconds,
                estimate.dirty_pages_high / seconds,
                estimate.sampled_pages
            )
        }
        Err(error) => format!("no estimate: {error}"),
    };
    Some(format!("{:>7} {:<16} {text}", vm.vm.pid, vm.name))
}

pub(super) fn summary(out: &mut impl Write, session: &Session, choice: Choice) -> anyhow::Result<()> {
    let (vcpus, left_out) = session.summary();
    writeln!(
        out,
        "\n{:>7} {:<16} {:>4} {:>12} {:>9} {:>9} {:>9} {:>7} {:>8} {:>8} {:>9} SOURCE",
        "PID", "VM", "VCPU", "PAGES", "OBSERVED", "AVG/s", "MOST/s", "HIGH", "FULL", "RESETS", "OVERFLOW"
    )?;
    for summary in vcpus.iter().filter(|summary| choice.vcpu.is_none_or(|vcpu| vcpu == summary.row.vcpu)) {
        let row = &summary.row;
        let style = if row.overflows > 0 { ALARM } else { Style::new() };
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        writeln!(
            out,
            "{style}{:>7} {:<16.16} {:>4} {:>12} {:>8.1}s {:>9} {:>9.0} {:>7} {:>8} {:>8} {:>9} {}{}{style:#}",
            row.pid,
            row.vm,
            row.vcpu,
            or_none(row.dirty_pages.map(|pages| pages.to_string())),
            summary.observed.as_secs_f64(),
            or_none(row.average_pages_per_s.map(|rate| format!("{rate:.0}"))),
            summary.most_pages_per_s,
            or_none(row.ring.map(|ring| ring.high_water.to_string())),
            row.ring_full_exits,
            row.resets,
            row.overflows,
            row.source.name(),
            if row.ended { ", ended" } else { "" },
        )?;
        if row.overwritten > 0 {
            writeln!(
                out,
                "{ALARM}{:>31} {} entries were overwritten and are lost{ALARM:#}",
                "", row.overwritten
            )?;
        }
    }
    if left_out > 0 {
        writeln!(out, "and {left_out} vCPUs of VMs that have ended")?;
    }
    if let Some(left_out) = not_counted(&session.profiler().totals()?) {
        writeln!(out, "{left_out}")?;
    }
    Ok(())
}
