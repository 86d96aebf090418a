//! How fast the guest adds to what is left to be sent, as measured just now: curves know what it did, not what it begins to do.

/// Pages added to what is left: dirtied anew, and not waiting to be sent anyway.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    /// In the rounds before the current one.
    before: f64,
    /// When the last two looks were, and how much had been added by then.
    looks: [Option<(f64, f64)>; 2],
    adds_per_s: Option<f64>,
}

impl Pace {
    /// So much was added in the round that has ended.
    pub fn round_ended(&mut self, adds: f64) {
        self.before += adds;
    }

    /// So much was added in the current round by now. Looks are half of `window_s` apart.
    pub fn observe(&mut self, at: f64, adds: f64, window_s: f64) {
        let now = (at, self.before + adds);
        let [older, newer] = self.looks;
        if let Some((then, had)) = older
            && at > then
        {
            self.adds_per_s = Some(((now.1 - had) / (at - then)).max(0.0));
        }
        if newer.is_none_or(|(then, _)| at >= then + window_s / 2.0) {
            self.looks = [newer, Some(now)];
        }
    }

    /// Over at least half the window and at most all of it; `None` before that.
    pub fn adds_per_s(&self) -> Option<f64> {
        self.adds_per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_seen_within_the_window_and_across_rounds() {
        let mut pace = Pace::default();
        let mut adds = 0.0;
        for ms in 0..1000u32 {
            if ms == 500 {
                pace.round_ended(adds);
                adds = 0.0;
            }
            adds += if ms < 400 { 1.0 } else { 10.0 };
            pace.observe(f64::from(ms) / 1e3, adds, 0.2);
            match ms {
                0..100 => assert_eq!(pace.adds_per_s(), None, "{ms}"),
                110..400 => assert!((pace.adds_per_s().unwrap() - 1000.0).abs() < 20.0, "{ms}"),
                600.. => assert!((pace.adds_per_s().unwrap() - 10_000.0).abs() < 200.0, "{ms} {pace:?}"),
                _ => {}
            }
        }
    }
}
