//! `none`: nobody is slowed down.

use super::rule::{Decision, Parameters, Rule, View};
use crate::converge::model::Conditions;

/// Parameters of `none`: there are none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Nobody;

impl Parameters for Nobody {
    fn rule(self) -> Box<dyn Rule> {
        Box::new(self)
    }
}

impl Rule for Nobody {
    fn decide(&mut self, view: &View<'_>, conditions: Option<&Conditions>) -> Decision {
        let forecast = conditions.and_then(|conditions| view.writers.free(conditions, view.round));
        Decision::alike(view, None, forecast)
    }
}
