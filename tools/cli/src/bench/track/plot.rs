//! The measurements as a picture: time of a harvest over memory size, both axes logarithmic. A colour per workload;
//! ring and bitmap differ in the line.

use std::collections::BTreeMap;
use std::path::Path;

use plotters::prelude::*;

use super::{Backend, Pattern, Point};

const GIB: f64 = (1_u64 << 30) as f64;
const SIZE: (u32, u32) = (1030, 600);
/// What the legend takes of the width.
const LEGEND: u32 = 220;
/// Okabe and Ito's colours, which the colour-blind can tell apart, too.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// What one colour stands for.
type Workload = (u64, bool, usize);

fn workload(point: &Point) -> Workload {
    (point.dirty_pages, point.pattern == Pattern::Sparse, point.vcpus)
}

fn place(point: &Point) -> (f64, f64) {
    (point.memory_bytes as f64 / GIB, point.figures.sync_us_median)
}

/// The range of some values, with a margin for a logarithmic axis.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::MAX, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
    low.max(f64::MIN_POSITIVE) / 1.5..high.max(f64::MIN_POSITIVE) * 1.5
}

fn thin_dashes(backend: Backend) -> bool {
    backend == Backend::Bitmap
}

/// Draws into an SVG file.
///
/// # Errors
///
/// The file cannot be written.
pub fn draw(file: &Path, points: &[Point]) -> anyhow::Result<()> {
    let mut lines: BTreeMap<(Workload, bool), Vec<&Point>> = BTreeMap::new();
    for point in points {
        lines.entry((workload(point), thin_dashes(point.backend))).or_default().push(point);
    }
    // The legend in the order in which the lines end, so that the eye can go across.
    let mut lines: Vec<_> = lines.into_iter().collect();
    let end = |line: &[&Point]| line.last().map_or(0.0, |point| point.figures.sync_us_median);
    lines.sort_by(|(_, a), (_, b)| end(b).total_cmp(&end(a)));
    let mut workloads: Vec<Workload> = points.iter().map(workload).collect();
    workloads.sort_unstable();
    workloads.dedup();
    let several_vcpus = workloads.iter().any(|(_, _, vcpus)| *vcpus != 1);

    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, legend) = root.split_horizontally(SIZE.0 - LEGEND);
    let mut chart = ChartBuilder::on(&left)
        .caption("Time of a harvest: KVM's dirty ring and bitmap", ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(
            range(points.iter().map(|point| place(point).0)).log_scale(),
            range(points.iter().map(|point| place(point).1)).log_scale(),
        )?;
    let plain = |value: &f64| format!("{value}");
    chart
        .configure_mesh()
        .x_desc("guest memory, GiB")
        .y_desc("median time until the pages may be read, µs")
        .x_label_formatter(&plain)
        .y_label_formatter(&plain)
        .light_line_style(BLACK.mix(0.06))
        .draw()?;
    for (i, ((work, dashed), line)) in lines.iter().enumerate() {
        let at = workloads.iter().position(|other| other == work).unwrap_or(0);
        let colour = COLOURS[at % COLOURS.len()];
        let style = colour.stroke_width(if *dashed { 1 } else { 3 });
        let places = || line.iter().map(|point| place(point));
        if *dashed {
            chart.draw_series(DashedLineSeries::new(places(), 6, 4, style))?;
        } else {
            chart.draw_series(LineSeries::new(places(), style))?;
        }
        chart.draw_series(places().map(|place| Circle::new(place, 4, colour.filled())))?;

        let y = 72 + 24 * i32::try_from(i)?;
        let stroke = |from, to| PathElement::new(vec![(from, y), (to, y)], style);
        if *dashed {
            (0..3).try_for_each(|dash| legend.draw(&stroke(dash * 10, dash * 10 + 6)))?;
        } else {
            legend.draw(&stroke(0, 26))?;
        }
        let (pages, sparse, vcpus) = work;
        let name = format!(
            "{}, {pages} pages, {}{}",
            if *dashed { "bitmap" } else { "ring" },
            if *sparse { "sparse" } else { "dense" },
            if several_vcpus { format!(", {vcpus} vCPUs") } else { String::new() },
        );
        legend.draw(&Text::new(name, (34, y - 6), ("sans-serif", 13)))?;
    }
    root.present()?;
    Ok(())
}
