//! The measurements as a picture: time of a harvest over memory size, both axes logarithmic, a line per backend,
//! pattern and number of dirty pages.

use std::collections::BTreeMap;
use std::path::Path;

use plotters::prelude::*;

use super::{Backend, Pattern, Point};

const GIB: f64 = (1_u64 << 30) as f64;

/// Draws into an SVG file.
///
/// # Errors
///
/// The file cannot be written.
pub fn draw(file: &Path, points: &[Point]) -> anyhow::Result<()> {
    let mut lines: BTreeMap<String, Vec<&Point>> = BTreeMap::new();
    for point in points {
        let name = format!(
            "{:?}, {:?}, {} pages, {} vCPU",
            point.backend, point.pattern, point.dirty_pages, point.vcpus
        );
        lines.entry(name.to_lowercase()).or_default().push(point);
    }
    let range = |value: fn(&Point) -> f64| {
        let values = points.iter().map(value);
        let (low, high) = values.fold((f64::MAX, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
        low.max(f64::MIN_POSITIVE) / 1.5..high.max(f64::MIN_POSITIVE) * 1.5
    };
    let root = SVGBackend::new(file, (960, 600)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Harvest of dirty pages: KVM's ring and bitmap", ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(
            range(|point| point.memory_bytes as f64 / GIB).log_scale(),
            range(|point| point.figures.sync_us_median).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("guest memory, GiB")
        .y_desc("median time until the pages may be read, µs")
        .draw()?;
    for (i, (name, line)) in lines.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        let ring = line.iter().any(|point| point.backend == Backend::Ring);
        let dense = line.iter().any(|point| point.pattern == Pattern::Dense);
        let style = colour.stroke_width(if ring { 3 } else { 1 });
        let places =
            || line.iter().map(|point| (point.memory_bytes as f64 / GIB, point.figures.sync_us_median));
        chart
            .draw_series(LineSeries::new(places(), style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 24, y)], style));
        chart.draw_series(places().map(|place| {
            let filled = if dense { colour.filled() } else { colour.stroke_width(1) };
            Circle::new(place, 4, filled)
        }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
