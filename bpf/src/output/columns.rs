//! The columns of the table, live or in lines: titles, cells and the order they sort by.

use std::time::Duration;

use ringferry_bpf::{Look, Row, Totals};

use super::mib;

/// One column. The order of [`COLUMNS`] is that on the screen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub title: &'static str,
    /// One more than the title, for the arrow of the sort order.
    pub width: usize,
    /// Where there is no room for all, those of the least worth go first.
    pub worth: u8,
    pub left: bool,
    pub cell: fn(&Row, Duration) -> String,
    /// What larger means when rows are sorted by this column; equal rows keep their order.
    pub rank: fn(&Row) -> f64,
}

const NONE: &str = "-";

const fn number(
    title: &'static str,
    width: usize,
    worth: u8,
    cell: fn(&Row, Duration) -> String,
    rank: fn(&Row) -> f64,
) -> Column {
    Column { title, width, worth, left: false, cell, rank }
}

pub(crate) const COLUMNS: [Column; 15] = [
    number("PID", 7, 11, |row, _| row.pid.to_string(), |row| f64::from(row.pid)),
    Column {
        title: "VM",
        width: 16,
        worth: 10,
        left: true,
        cell: |row, _| row.vm.clone(),
        rank: |row| f64::from(row.pid),
    },
    number("VCPU", 5, 15, |row, _| row.vcpu.to_string(), |row| f64::from(row.vcpu)),
    number(
        "TID",
        7,
        4,
        |row, _| {
            row.tid.map_or_else(|| if row.ended { "ended" } else { NONE }.to_owned(), |tid| tid.to_string())
        },
        |row| f64::from(row.tid.unwrap_or(0)),
    ),
    number(
        "PAGES/s",
        8,
        14,
        |row, _| whole(row.dirty_pages_per_s),
        |row| row.dirty_pages_per_s.unwrap_or(-1.0),
    ),
    number(
        "MiB/s",
        7,
        9,
        |row, _| tenth(row.dirty_pages_per_s.map(mib)),
        |row| row.dirty_pages_per_s.unwrap_or(-1.0),
    ),
    number(
        "AVG/s",
        8,
        3,
        |row, _| whole(row.average_pages_per_s),
        |row| row.average_pages_per_s.unwrap_or(-1.0),
    ),
    number(
        "AVGMiB/s",
        9,
        1,
        |row, _| tenth(row.average_pages_per_s.map(mib)),
        |row| row.average_pages_per_s.unwrap_or(-1.0),
    ),
    number(
        "SHARE",
        6,
        7,
        |row, _| row.share.map_or_else(|| NONE.to_owned(), |share| format!("{:.0}%", share * 100.0)),
        |row| row.share.unwrap_or(-1.0),
    ),
    number(
        "RING",
        11,
        6,
        |row, _| row.ring.map_or_else(|| NONE.to_owned(), |ring| format!("{}/{}", ring.used, ring.size)),
        |row| row.ring.map_or(-1.0, |ring| f64::from(ring.used) / f64::from(ring.size.max(1))),
    ),
    number(
        "HIGH",
        6,
        5,
        |row, _| row.ring.map_or_else(|| NONE.to_owned(), |ring| ring.high_water.to_string()),
        |row| row.ring.map_or(-1.0, |ring| f64::from(ring.high_water)),
    ),
    number(
        "FULL/s",
        7,
        5,
        |row, interval| rate(row, row.ring_full_exits, interval),
        |row| row.ring_full_exits as f64,
    ),
    number("RESET/s", 8, 2, |row, interval| rate(row, row.resets, interval), |row| row.resets as f64),
    number(
        "OVERFLOW",
        9,
        13,
        |row, _| if row.ring.is_some() { row.overflows_so_far.to_string() } else { NONE.to_owned() },
        |row| row.overflows_so_far as f64,
    ),
    Column {
        title: "SOURCE",
        width: 15,
        worth: 12,
        left: true,
        cell: |row, _| row.source.name().to_owned(),
        rank: |row| row.dirty_pages_per_s.unwrap_or(-1.0),
    },
];

/// The columns that a line of `width` characters has room for, each with a blank before the next: nothing is ever cut, as
/// a number without its first digit is a wrong one.
pub(crate) fn that_fit(width: usize) -> Vec<usize> {
    let mut by_worth: Vec<usize> = (0..COLUMNS.len()).collect();
    by_worth.sort_by_key(|&index| std::cmp::Reverse(COLUMNS[index].worth));
    let mut left = width + 1;
    let mut fitting: Vec<usize> = by_worth
        .into_iter()
        .map_while(|index| {
            left = left.checked_sub(COLUMNS[index].width + 1)?;
            Some(index)
        })
        .collect();
    fitting.sort_unstable();
    fitting
}

impl Column {
    /// A cell or a title, padded to the column's width.
    pub(crate) fn padded(&self, text: &str) -> String {
        let text: String = text.chars().take(if self.left { self.width } else { usize::MAX }).collect();
        let width = self.width;
        if self.left { format!("{text:<width$}") } else { format!("{text:>width$}") }
    }
}

/// One line over all VMs: `2 VMs, 6 vCPUs, 51200 pages/s (200.0 MiB/s)`, and what could not be counted.
pub(crate) fn headline(look: &Look) -> String {
    let rate: f64 = look.rows.iter().filter_map(|row| row.dirty_pages_per_s).sum();
    let vcpus = look.rows.iter().filter(|row| !row.ended).count();
    let mut line = format!(
        "{} VM{}, {vcpus} vCPU{}, {rate:.0} pages/s ({:.1} MiB/s)",
        look.vms.len(),
        plural(look.vms.len()),
        plural(vcpus),
        mib(rate)
    );
    if let Some(left_out) = not_counted(&look.totals) {
        line += &format!(", {left_out}");
    }
    line
}

/// What the totals say is missing from the counts; `None` if nothing is.
pub(crate) fn not_counted(totals: &Totals) -> Option<String> {
    let parts = [
        (totals.dropped_pushes, "pushes (too many vCPUs)"),
        (totals.dropped_ring_full_exits, "full rings and their overflows (too many vCPUs)"),
        (totals.dropped_region_pushes, "pushes in regions (too many regions)"),
    ];
    let parts: Vec<String> =
        parts.iter().filter(|(count, _)| *count > 0).map(|(count, of)| format!("{count} {of}")).collect();
    (!parts.is_empty()).then(|| format!("not counted: {}", parts.join(", ")))
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn whole(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.0}"))
}

fn tenth(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.1}"))
}

fn rate(row: &Row, count: u64, interval: Duration) -> String {
    match row.ring {
        Some(_) if !interval.is_zero() => format!("{:.1}", count as f64 / interval.as_secs_f64()),
        _ => NONE.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn titles(width: usize) -> Vec<&'static str> {
        that_fit(width).into_iter().map(|index| COLUMNS[index].title).collect()
    }

    #[test]
    fn a_narrow_line_has_fewer_columns_and_never_half_a_one() {
        assert_eq!(titles(200).len(), COLUMNS.len());
        assert_eq!(titles(80), ["PID", "VM", "VCPU", "PAGES/s", "MiB/s", "SHARE", "OVERFLOW", "SOURCE"]);
        assert_eq!(titles(30), ["VCPU", "PAGES/s", "OVERFLOW"]);
        assert!(titles(3).is_empty());
        for width in 0..200 {
            let taken: usize = that_fit(width).iter().map(|&index| COLUMNS[index].width + 1).sum();
            assert!(taken <= width + 1, "{width}");
        }
    }
}
