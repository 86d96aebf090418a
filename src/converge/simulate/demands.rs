//! Named migrations and what each of them has to show: the yardstick of the controller.

use std::time::Duration;

use super::{
    Burst, Cliff, Guest, LimitKept, Link, Machine, Order, Phase, Seen, SendOrder, Simulated, Step, Writer,
    simulate,
};
use crate::converge::{Pages, Settings};

/// What has to come of a simulated migration. What is `None` does not matter.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Demand {
    /// How it may end.
    pub ends: Ends,
    /// The longest that it may take.
    pub total: Option<Duration>,
    /// The longest that the guest may stand still, whatever its limit.
    pub downtime: Option<Duration>,
    /// The longest that the worst-off vCPU may be held back.
    pub throttled: Option<Duration>,
    /// The most that it may lose.
    pub lost: Option<Duration>,
    /// The longest stall.
    pub stall: Option<Duration>,
    /// How far the total may be from what was predicted after the first round, as a share of it.
    pub predicted_within: Option<f64>,
    /// Switchovers that may be called off.
    pub called_off: Option<u32>,
}

/// How a migration may end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ends {
    /// Within its downtime limit.
    #[default]
    WithinTheLimit,
    /// Or beyond it, if an event says why; or not at all, if that is said by the end of the second round.
    OrSaysWhyNot,
    /// It cannot, and says so by the end of the second round.
    Never,
}

impl Demand {
    /// What of it was not met, in words.
    pub fn unmet(&self, done: &Simulated) -> Vec<String> {
        let mut unmet = Vec::new();
        let said = done.said_not_to_end_since.is_some_and(|round| round <= 2);
        match (self.ends, &done.limit) {
            (Ends::Never, LimitKept::NeverTried) | (Ends::OrSaysWhyNot, LimitKept::NeverTried) if said => {}
            (Ends::Never, LimitKept::NeverTried) => unmet.push("does not end and does not say so".to_owned()),
            (Ends::Never, _) if said => {}
            (Ends::Never, _) => unmet.push("it ended, which was not said to be impossible".to_owned()),
            (_, LimitKept::Yes) | (Ends::OrSaysWhyNot, LimitKept::NoAndSaid(_)) => {}
            (_, LimitKept::NeverTried) => unmet.push("does not end".to_owned()),
            (_, LimitKept::NoAndSaid(change)) => unmet.push(format!("beyond the limit ({change:?})")),
            (_, LimitKept::NoAndSilent) => unmet.push("beyond the limit, and nothing said so".to_owned()),
        }
        let mut at_most = |what: &str, is: Duration, most: Option<Duration>| {
            if let Some(most) = most.filter(|most| is > *most) {
                unmet.push(format!("{what} {:.3} s of {:.3} s", is.as_secs_f64(), most.as_secs_f64()));
            }
        };
        at_most("total", done.total, self.total);
        at_most("pause", done.downtime, self.downtime);
        at_most("throttled", done.throttled(), self.throttled);
        at_most("lost", done.lost(), self.lost);
        at_most("stall", done.longest_stall(), self.stall);
        if let Some(within) = self.predicted_within {
            let predicted =
                done.predicted_after_round_1.and_then(|prediction| prediction.total).unwrap_or_default();
            let share = predicted.as_secs_f64() / done.total.as_secs_f64();
            if (share - 1.0).abs() > within {
                unmet.push(format!("predicted {share:.2} of what it took"));
            }
        }
        if let Some(most) = self.called_off.filter(|most| done.called_off > *most) {
            unmet.push(format!("called off {} times of {most}", done.called_off));
        }
        unmet
    }
}

/// A migration with a name.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// Who is migrated.
    pub guest: Guest,
    /// Over what.
    pub link: Link,
    /// Between what.
    pub machine: Machine,
    /// Under which conditions.
    pub settings: Settings,
    /// When it is given up.
    pub patience: Duration,
    /// What has to come of it.
    pub demand: Demand,
}

impl Scenario {
    /// Runs it.
    pub fn run(&self) -> Simulated {
        simulate(&self.guest, &self.link, &self.machine, self.settings.clone(), self.patience)
    }

    fn limit(mut self, ms: u64) -> Self {
        self.settings.limits.downtime = Duration::from_millis(ms);
        self
    }

    fn demands(mut self, demand: Demand) -> Self {
        self.demand = demand;
        self
    }

    fn on(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }
}

const MIB: u64 = 1 << 20;
const FLAT_OUT: f64 = f64::INFINITY;

const fn ms(ms: u64) -> Option<Duration> {
    Some(Duration::from_millis(ms))
}

const fn mib(mib: u64) -> Pages {
    Pages(mib * 256)
}

/// The guest of the published test: 2 GiB, 600 MiB of it non-zero, these writers, and a vCPU that only reads; 500 ms of
/// downtime, 1 ms between two looks.
fn scenario(name: &'static str, mut writers: Vec<Writer>, link: Link) -> Scenario {
    writers.push(Writer::default());
    let guest = Guest { ram: mib(2048), populated: mib(600), writers, ..Guest::default() };
    let machine = Machine::default();
    let settings = Settings::new(guest.ram);
    let (patience, demand) = (Duration::from_secs(120), Demand::default());
    Scenario { name, guest, link, machine, settings, patience, demand }.limit(500)
}

fn steady(set_mib: u64, bytes_per_s: f64) -> Vec<Writer> {
    vec![Writer::steady(set_mib * MIB, bytes_per_s)]
}

/// All of them.
pub fn scenarios() -> Vec<Scenario> {
    [standing(), pauses(), devices(), links(), limits(), hosts(), orders()].concat()
}

/// What the controller could do at a50b070, over 100 MB/s.
fn standing() -> Vec<Scenario> {
    let of = |name, set, rate, total, throttled| {
        let demand = Demand {
            total: ms(total),
            throttled: ms(throttled),
            stall: ms(160),
            called_off: Some(0),
            predicted_within: Some(0.15),
            ..Demand::default()
        };
        scenario(name, steady(set, rate), Link::steady(100e6)).demands(demand)
    };
    let mut two = steady(512, FLAT_OUT);
    two.extend(steady(512, FLAT_OUT));
    let mut one_of_eight = vec![Writer::steady(8 * MIB, 5e6); 7];
    one_of_eight.insert(0, Writer::steady(100 * MIB, FLAT_OUT));
    let mut two = scenario("heavy-512m-twice", two, Link::steady(100e6));
    two.guest.populated = mib(1100);
    let demand = Demand { total: ms(30_000), predicted_within: Some(0.15), ..Demand::default() };
    vec![
        of("rhel73-30m", 30, FLAT_OUT, 7_500, 0),
        of("rhel73-50m", 50, FLAT_OUT, 7_800, 600),
        of("rhel73-60m", 60, FLAT_OUT, 7_900, 800),
        of("rhel73-100m", 100, FLAT_OUT, 8_400, 1_500),
        of("heavy-512m", 512, FLAT_OUT, 13_000, 8_000),
        of("heavy-512m-50", 512, 50e6, 13_000, 1_000),
        of("heavy-512m-80", 512, 80e6, 30_000, 1_000),
        of("heavy-512m-150", 512, 150e6, 14_000, 6_000),
        two.demands(demand),
        scenario("one-heavy-of-eight", one_of_eight, Link::steady(100e6))
            .demands(Demand { total: ms(9_000), ..Demand::default() }),
    ]
}

/// The pause is a cost.
fn pauses() -> Vec<Scenario> {
    let pause = |ms_max, throttled| Demand {
        downtime: ms(ms_max),
        throttled: ms(throttled),
        called_off: Some(0),
        ..Demand::default()
    };
    let small = Demand { downtime: ms(290), throttled: ms(0), ..Demand::default() };
    let unlimited = Demand { downtime: ms(60), lost: ms(200), total: ms(900), ..Demand::default() };
    let bursts = Burst { every: Duration::from_secs(5), lasts: Duration::from_millis(2500) };
    // What a burst dirties again of what has been sent is sent twice: how much that is depends on when it comes.
    let garbage = |name, from_ms, total, throttled| {
        let mut writer = Writer::steady(500 * MIB, FLAT_OUT).in_bursts(bursts);
        writer.phases[0].from = Duration::from_millis(from_ms);
        let demand = Demand { total: ms(total), throttled: ms(throttled), ..Demand::default() };
        scenario(name, vec![writer], Link::steady(100e6)).demands(demand)
    };
    vec![
        scenario("idle", Vec::new(), Link::steady(100e6)).limit(300).demands(pause(25, 0)),
        scenario("idle-loopback", Vec::new(), Link::steady(2.5e9)).limit(300).demands(pause(25, 0)),
        scenario("slow-writer", steady(256, 5e6), Link::steady(100e6)).limit(300).demands(pause(25, 0)),
        scenario("small-set", steady(30, FLAT_OUT), Link::steady(125e6)).demands(small),
        scenario("unlimited", steady(60, FLAT_OUT), Link::steady(2.5e9)).demands(unlimited),
        garbage("bursts", 0, 8_200, 3_000),
        garbage("bursts-from-2.5-s", 2500, 8_000, 2_500),
        garbage("bursts-from-1-s", 1000, 9_200, 4_300),
        garbage("bursts-from-2-s", 2000, 8_000, 2_800),
        garbage("bursts-from-4-s", 4000, 8_600, 2_500),
    ]
}

/// Writers that no gate stops.
fn devices() -> Vec<Scenario> {
    let with = |name, set, rate, writers| {
        let mut scenario = scenario(name, writers, Link::steady(100e6));
        scenario.guest.devices = steady(set, rate);
        scenario
    };
    let nobody = Demand { throttled: ms(0), called_off: Some(0), total: ms(12_000), ..Demand::default() };
    let mut unseen = with("device-20-at-harvests", 256, 20e6, Vec::new());
    unseen.guest.devices_seen = Seen::AtHarvests;
    let paid = Demand { throttled: ms(1_500), called_off: Some(0), total: ms(12_000), ..Demand::default() };
    vec![
        with("device-20", 256, 20e6, Vec::new()).demands(nobody),
        unseen.demands(nobody),
        with("device-50", 256, 50e6, Vec::new()).demands(Demand { total: ms(20_000), ..nobody }),
        with("device-20-and-a-writer", 256, 20e6, steady(60, FLAT_OUT)).demands(paid),
        with("device-120", 256, 120e6, Vec::new()).demands(Demand {
            ends: Ends::Never,
            throttled: ms(0),
            ..Demand::default()
        }),
        with("device-120-and-a-writer", 256, 120e6, steady(60, FLAT_OUT)).demands(Demand {
            ends: Ends::Never,
            throttled: ms(500),
            ..Demand::default()
        }),
    ]
}

/// Links that change, are slow, or far.
fn links() -> Vec<Scenario> {
    let cliff =
        |lasts_s| Cliff { after: Duration::from_millis(1), lasts: Duration::from_secs(lasts_s), share: 0.1 };
    let over = |lasts_s| Link { cliff: Some(cliff(lasts_s)), ..Link::steady(100e6) };
    let dropped = |until: Option<u64>| {
        let step = Step { at: Duration::from_secs(3), until: until.map(Duration::from_secs), share: 0.1 };
        Link { steps: vec![step], ..Link::steady(100e6) }
    };
    let far = |limit, ends| {
        let link = Link { round_trip: Duration::from_millis(100), ..Link::steady(100e6) };
        let name = if limit == 1000 { "round-trip-100-limit-1000" } else { "round-trip-100-limit-300" };
        let demand = Demand { ends, total: ms(11_000), throttled: ms(2_000), ..Demand::default() };
        scenario(name, steady(60, FLAT_OUT), link).limit(limit).demands(demand)
    };
    // What is unsent at the drop, and the set once more, at a tenth of the rate.
    let needs = |set: u64| 3.0 + ((600 + set) * MIB) as f64 / 10e6 - 30.0;
    let for_good = |name, set, rate| {
        let total = Duration::from_secs_f64(1.3 * needs(set));
        let demand = Demand { total: Some(total), stall: ms(160), ..Demand::default() };
        scenario(name, steady(set, rate), dropped(None)).demands(demand)
    };
    let paced = Link { max_bandwidth: Some(20e6), ..Link::steady(1e9) };
    let mut slow = scenario("10-mbit", steady(8, FLAT_OUT), Link::steady(1.25e6)).limit(300);
    slow.guest.populated = mib(64);
    slow.patience = Duration::from_secs(300);
    let mut fast =
        scenario("400-gbit", vec![Writer::steady(1 << 30, FLAT_OUT); 8], Link::steady(50e9)).limit(300);
    (fast.guest.ram, fast.guest.populated) = (mib(64 << 10), mib(32 << 10));
    fast.link.round_trip = Duration::from_micros(100);
    vec![
        scenario("cliff-after-the-stop", steady(60, FLAT_OUT), over(5))
            .demands(Demand { total: ms(20_000), ..Demand::default() }),
        scenario("cliff-for-good", steady(60, 20e6), over(600)),
        for_good("drop-for-good-60m", 60, FLAT_OUT),
        for_good("drop-for-good-30m", 30, FLAT_OUT),
        for_good("drop-for-good-512m-5", 512, 5e6),
        scenario("drop-for-5-s", steady(100, FLAT_OUT), dropped(Some(8))).demands(Demand {
            total: ms(15_000),
            stall: ms(160),
            ..Demand::default()
        }),
        far(1000, Ends::WithinTheLimit),
        far(300, Ends::OrSaysWhyNot),
        scenario("max-bandwidth-20-of-1000", steady(30, FLAT_OUT), paced).limit(300).demands(Demand {
            downtime: ms(80),
            throttled: ms(100),
            ..Demand::default()
        }),
        slow.demands(Demand {
            ends: Ends::OrSaysWhyNot,
            throttled: ms(30_000),
            stall: ms(160),
            ..Demand::default()
        }),
        fast.demands(Demand { total: ms(3_000), ..Demand::default() }),
    ]
}

/// Limits that are hard or impossible to keep: 2 ms of overhead, and 20.
fn limits() -> Vec<Scenario> {
    let of = |name, limit, overhead, ends| {
        let machine = Machine { switchover: Duration::from_millis(overhead), ..Machine::default() };
        let demand =
            Demand { ends, total: ms(30_000), throttled: ms(4_000), stall: ms(160), ..Demand::default() };
        scenario(name, steady(60, FLAT_OUT), Link::steady(100e6)).limit(limit).on(machine).demands(demand)
    };
    vec![
        of("limit-20-of-2", 20, 2, Ends::OrSaysWhyNot),
        of("limit-10-of-2", 10, 2, Ends::OrSaysWhyNot),
        of("limit-5-of-2", 5, 2, Ends::OrSaysWhyNot),
        of("limit-20-of-20", 20, 20, Ends::OrSaysWhyNot),
        of("limit-5-of-20", 5, 20, Ends::OrSaysWhyNot),
    ]
}

/// Hosts with cheap faults, hosts that are busy, hosts with PML, small rings.
fn hosts() -> Vec<Scenario> {
    let usual = Machine::default();
    let cheap = Machine { fault: Duration::from_nanos(200), ..usual };
    let busy = Machine { kick: Duration::from_millis(3), sample_interval: Duration::from_millis(1), ..usual };
    let pml = Machine { held_back: 512, fault: Duration::from_nanos(200), ..usual };
    let of = |name, set, rate, machine, total| {
        let demand = Demand { total: ms(total), stall: ms(160), ..Demand::default() };
        scenario(name, steady(set, rate), Link::steady(100e6)).on(machine).demands(demand)
    };
    let mut many = of("pml-16-vcpus", 60, FLAT_OUT, pml, 9_000);
    many.guest.writers.extend(vec![Writer::steady(MIB, 1e5); 14]);
    vec![
        of("cheap-faults-60m", 60, FLAT_OUT, cheap, 9_000),
        of("cheap-faults-512m", 512, FLAT_OUT, cheap, 15_000),
        of("busy-host-60m", 60, FLAT_OUT, busy, 9_000),
        of("busy-host-512m-150", 512, 150e6, busy, 15_000),
        of("small-ring-60m", 60, FLAT_OUT, Machine { ring_entries: 4032, ..usual }, 9_000),
        many,
    ]
}

/// What the order of sending does to one pass after the other, to hot pages, and to random ones.
fn orders() -> Vec<Scenario> {
    let orders = [SendOrder::Ascending, SendOrder::FromTheTop, SendOrder::YoungFirst, SendOrder::OldFirst];
    let cyclic = ["cyclic-up", "cyclic-down", "cyclic-young", "cyclic-old"];
    let hot = ["hot-cold-up", "hot-cold-down", "hot-cold-young", "hot-cold-old"];
    let random = ["random-up", "random-down", "random-young", "random-old"];
    let of = |names: [&'static str; 4], order| {
        let writer = Phase { pages: mib(512), writes_per_s: 60e6 / 4096.0, order, ..Phase::default() };
        let writers = || vec![Writer { phases: vec![writer] }];
        let one = |(name, order)| {
            scenario(name, writers(), Link::steady(100e6)).on(Machine { order, ..Machine::default() })
        };
        names.into_iter().zip(orders).map(one).collect::<Vec<_>>()
    };
    let hot_cold = Order::HotCold { hot: 0.1, writes: 0.9 };
    [of(cyclic, Order::Cyclic), of(hot, hot_cold), of(random, Order::Random)].concat()
}
