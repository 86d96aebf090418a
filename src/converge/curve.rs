//! One vCPU's working-set curve: how many different pages it dirties in a given time after a recycle.
//!
//! Time is the vCPU's own **running time**: what it spent behind a closed gate is not in it, so a curve learnt
//! while it was throttled is still its curve. The curve starts at (0, 0), never falls, and is kept at knots √2
//! apart, from half a millisecond on: a guess that is wrong by a fraction of `t` matters equally little for
//! rounds of any length. `model` puts the curves of all vCPUs together.

/// The first knot, in seconds: below the time between two observations.
const FIRST_KNOT_S: f64 = 0.5e-3;
/// √2 apart, the last knot is beyond a week.
const KNOTS: usize = 64;
/// Weight of the newest round against all earlier ones. Guests change phase; one round old is old.
const NEWEST: f64 = 0.6;
/// Beyond these an observation is nonsense, or might as well be: 30 years, and 2⁶² pages.
const LONGEST_S: f64 = 1e9;
const MOST_PAGES: f64 = 4.6e18;

/// n(t): unique pages dirtied after `t` seconds of running since the last recycle.
#[derive(Clone, Debug)]
pub struct Curve {
    /// n at each knot; those from `known` on have never been reached.
    pages: [f64; KNOTS],
    known: usize,
    /// The farthest point ever observed; the curve goes on from here along its last slope.
    end: (f64, f64),
    /// In pages per second.
    slope_at_end: f64,
    /// The last observation since the recycle.
    seen: (f64, f64),
    /// Where on the curve the vCPU is: there, unless it was held back.
    last: (f64, f64),
    /// What the curve said at the last knot passed in this round, before this round changed it.
    before: Option<(usize, f64)>,
}

impl Default for Curve {
    fn default() -> Self {
        Self {
            pages: [0.0; KNOTS],
            known: 0,
            end: (0.0, 0.0),
            slope_at_end: 0.0,
            seen: (0.0, 0.0),
            last: (0.0, 0.0),
            before: None,
        }
    }
}

/// Where the knots are, in seconds.
const KNOT_S: [f64; KNOTS] = {
    let mut knots = [FIRST_KNOT_S; KNOTS];
    knots[1] *= std::f64::consts::SQRT_2;
    let mut k = 2;
    while k < KNOTS {
        knots[k] = 2.0 * knots[k - 2];
        k += 1;
    }
    knots
};

fn between((t0, n0): (f64, f64), (t1, n1): (f64, f64), t: f64) -> f64 {
    if t1 > t0 { n0 + (n1 - n0) * (t - t0) / (t1 - t0) } else { n1 }
}

impl Curve {
    /// Counts start at 0 again: the pages were recycled.
    pub fn recycled(&mut self) {
        // What lies beyond this round is moved by as much as its end moved: a guest that dirties twice as
        // fast in its first second is expected to do so in its second one, too.
        let before = self.before.take().filter(|(k, _)| *k + 1 < self.known && self.seen.0 < KNOT_S[*k + 1]);
        if let Some((k, before)) = before
            && before > 0.0
        {
            let scale = (self.pages[k] / before).clamp(0.25, 4.0);
            let moved = |n: f64| self.pages[k] + (n - before).max(0.0) * scale;
            let tail: Vec<f64> = self.pages[k + 1..self.known].iter().map(|n| moved(*n)).collect();
            self.end.1 = moved(self.end.1);
            self.pages[k + 1..self.known].copy_from_slice(&tail);
        }
        self.set_end(self.end);
        (self.seen, self.last) = ((0.0, 0.0), (0.0, 0.0));
    }

    /// `pages` different pages so far, after `t` seconds of running since the recycle.
    pub fn observe(&mut self, t: f64, pages: f64) {
        // NaN fails the comparison, too.
        if !(t > self.seen.0 && t <= LONGEST_S) {
            return;
        }
        let point = (t, pages.min(MOST_PAGES).max(self.last.1));
        let known_knots = self.known;
        let mut changed = false;
        for (k, &at) in KNOT_S.iter().enumerate() {
            if at <= self.seen.0 {
                continue;
            }
            if at > t {
                break;
            }
            let seen = between(self.seen, point, at);
            changed = true;
            if k < known_knots {
                self.before = Some((k, self.pages[k]));
                self.pages[k] += NEWEST * (seen - self.pages[k]);
            } else {
                self.pages[k] = seen;
                self.known = k + 1;
            }
        }
        if changed {
            self.straighten();
        }
        if t >= self.end.0 {
            self.set_end(point);
        } else if changed {
            self.set_end(self.end);
        }
        (self.seen, self.last) = (point, point);
    }

    /// Never falling; and in half the time at least half as many pages, as of every guest that goes on as it did. One that
    /// only began to write in the middle of a round will not wait as long in the next.
    fn straighten(&mut self) {
        for k in (2..self.known).rev() {
            self.pages[k - 2] = self.pages[k - 2].max(self.pages[k] / 2.0);
        }
        for k in 1..self.known {
            self.pages[k] = self.pages[k].max(self.pages[k - 1]);
        }
    }

    /// `pages` different pages so far, after `t` seconds of running, by a vCPU that was held back since the recycle. One
    /// that comes out of a stall is slower than its curve: it teaches only what lies beyond all that is known. But
    /// where on its curve the vCPU is, its pages say.
    pub fn observe_held(&mut self, t: f64, pages: f64) {
        let pages = pages.min(MOST_PAGES).max(self.last.1);
        if t > self.end.0 && pages >= self.end.1 {
            self.seen = self.end;
            self.observe(t, pages);
        }
        let at = self.time_to(pages);
        self.last = (if at.is_finite() { at } else { self.last.0 }, pages);
    }

    /// Pages observed since the recycle, and after how much running.
    pub fn last(&self) -> (f64, f64) {
        self.last
    }

    /// The curve of several writers together, `t` seconds of running after the recycle. Its knots are theirs.
    pub fn sum<'a>(curves: impl Iterator<Item = &'a Self> + Clone, t: f64) -> Self {
        let known = curves.clone().map(|curve| curve.known).max().unwrap_or(0);
        let mut sum = Self { known, ..Self::default() };
        let mut end_s = 0.0f64;
        for curve in curves.clone() {
            for (k, pages) in sum.pages[..known].iter_mut().enumerate() {
                *pages += if k < curve.known { curve.pages[k] } else { curve.at(KNOT_S[k]) };
            }
            end_s = end_s.max(curve.end.0);
            sum.last.1 += curve.last.1;
        }
        let at_end = curves.map(|curve| curve.at(end_s)).sum();
        sum.set_end((end_s, at_end));
        sum.last.0 = t;
        sum.seen = sum.last;
        sum
    }

    fn set_end(&mut self, (t, pages): (f64, f64)) {
        let pages = pages.max(self.pages[self.known.saturating_sub(1)]);
        self.end = (t, pages);
        // Over its last quarter: a working set that has shown its end did so there.
        let before = self.inside(t * 0.75);
        self.slope_at_end = if t > 0.0 { ((pages - before) / (t * 0.25)).max(0.0) } else { 0.0 };
    }

    /// Where the curve comes from and goes to with the `k`th knot, the last of them being its end.
    fn segment(&self, k: usize) -> ((f64, f64), (f64, f64)) {
        let point = |k: usize| (KNOT_S[k], self.pages[k]);
        let left = k.checked_sub(1).map_or((0.0, 0.0), point);
        (left, if k < self.known { point(k) } else { self.end })
    }

    /// The curve at `t`, which is not beyond its end.
    fn inside(&self, t: f64) -> f64 {
        let (left, right) = self.segment(KNOT_S[..self.known].partition_point(|at| *at <= t));
        between(left, right, t)
    }

    /// Different pages dirtied in the first `t` seconds of running. Beyond what was observed the curve goes on
    /// along its last slope: a working set that has not yet shown its end is assumed to have none.
    pub fn at(&self, t: f64) -> f64 {
        let t = super::units::sane(t);
        if t >= self.end.0 { self.end.1 + self.slope_at_end * (t - self.end.0) } else { self.inside(t) }
    }

    /// Running time after which `pages` different pages are dirty; infinite if that never happens.
    ///
    /// A vCPU that may dirty `pages` during a round of length `T` runs for this long, so `T` minus this is what
    /// throttling costs it, whatever the shape of its curve.
    pub fn time_to(&self, pages: f64) -> f64 {
        if pages.is_nan() || pages <= 0.0 {
            return 0.0;
        }
        let (left, right) = self.segment(self.pages[..self.known].partition_point(|n| *n < pages));
        if right.1 >= pages {
            return left.0 + (right.0 - left.0) * (pages - left.1) / (right.1 - left.1);
        }
        let slope = self.slope_at_end;
        if slope > 0.0 { self.end.0 + (pages - self.end.1) / slope } else { f64::INFINITY }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A round of a guest whose curve is `n`, seen every millisecond.
    fn observe_round(curve: &mut Curve, seconds: f64, n: impl Fn(f64) -> f64) {
        curve.recycled();
        let steps = super::super::units::whole(seconds * 1000.0);
        for ms in 1..=steps {
            let t = ms as f64 / 1000.0;
            curve.observe(t, n(t));
        }
    }

    #[test]
    fn a_working_set_that_is_full_stays_full() {
        let mut curve = Curve::default();
        observe_round(&mut curve, 6.0, |t| (150_000.0 * t).min(15_360.0));
        for t in [0.05f64, 0.2, 0.6, 3.0, 6.0, 600.0] {
            let truth = (150_000.0 * t).min(15_360.0);
            assert!((curve.at(t) - truth).abs() < 0.12 * truth, "{t}: {} not {truth}", curve.at(t));
        }
        assert!(curve.time_to(20_000.0).is_infinite());
    }

    #[test]
    fn a_steady_writer_is_extrapolated_along_its_line() {
        let mut curve = Curve::default();
        observe_round(&mut curve, 1.0, |t| 1000.0 * t);
        assert!((curve.at(10.0) - 10_000.0).abs() < 100.0);
        assert!((curve.time_to(10_000.0) - 10.0).abs() < 0.1);
    }

    #[test]
    fn a_faster_first_second_raises_the_expected_second_one() {
        let mut curve = Curve::default();
        observe_round(&mut curve, 4.0, |t| 1000.0 * t);
        observe_round(&mut curve, 1.0, |t| 2000.0 * t);
        curve.recycled();
        assert!(curve.at(4.0) > 5500.0, "{}", curve.at(4.0));
    }

    proptest! {
        #[test]
        fn the_sum_of_curves_is_the_curve_of_the_sum(
            writers in prop::collection::vec((1.0..100_000.0f64, 1.0..50_000.0f64, 0.01..3.0f64), 0..6), t in 0.0..10.0f64,
        ) {
            let curve = |(rate, set, seconds): &(f64, f64, f64)| {
                let mut curve = Curve::default();
                observe_round(&mut curve, *seconds, |t| (rate * t).min(*set));
                curve
            };
            let curves: Vec<Curve> = writers.iter().map(curve).collect();
            let sum = Curve::sum(curves.iter(), 1.0);
            let each: f64 = curves.iter().map(|curve| curve.at(t)).sum();
            prop_assert!((sum.at(t) - each).abs() <= 0.35 * each + 1e-6, "{} of {}", sum.at(t), each);
            prop_assert_eq!(sum.last().1, curves.iter().map(|curve| curve.last().1).sum::<f64>());
        }

        #[test]
        fn a_curve_never_falls_and_its_inverse_is_its_inverse(
            rounds in prop::collection::vec(
                prop::collection::vec((-0.1..2.0f64, -5.0..50_000.0f64), 0..40), 0..5),
            times in prop::collection::vec(0.0..100.0f64, 1..20),
        ) {
            let mut curve = Curve::default();
            for round in &rounds {
                curve.recycled();
                let (mut t, mut n) = (0.0, 0.0);
                for (dt, dn) in round {
                    t += dt;
                    n += dn;
                    curve.observe(t, n);
                }
            }
            let mut times = times;
            times.sort_by(f64::total_cmp);
            let mut previous = 0.0;
            for t in times {
                let n = curve.at(t);
                prop_assert!(n.is_finite() && n >= previous - 1e-6, "falls at {}: {} after {}", t, n, previous);
                previous = n;
                let back = curve.time_to(n);
                prop_assert!(back <= t * 1.0001 + 1e-9, "n({}) = {} but inverse {}", t, n, back);
                if back > 0.0 {
                    prop_assert!((curve.at(back) - n).abs() <= 1e-6 * n.max(1.0) + 1e-6);
                }
            }
        }

        #[test]
        fn nonsense_neither_panics_nor_poisons(t in any::<f64>(), n in any::<f64>()) {
            let mut curve = Curve::default();
            curve.observe(0.1, 10.0);
            curve.observe(t, n);
            curve.recycled();
            prop_assert!(!curve.at(1.0).is_nan());
            prop_assert!(!curve.at(t).is_nan());
            prop_assert!(!curve.time_to(n).is_nan());
        }
    }
}
