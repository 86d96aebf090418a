//! The controller against simulated guests: the published experiments, and random ones.

mod any;
mod demands;
mod properties;
mod scenarios;

use proptest::prelude::*;

use super::simulate::{Guest, Link, Machine, Order, Phase, Simulated, Writer, simulate};
use super::*;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
const FULL_SPEED: f64 = f64::INFINITY;

/// The guest of the published test: 2 GiB, 600 MiB of it non-zero, one writer, and a vCPU that only reads.
fn guest(set_mib: u64, bytes_per_s: f64) -> Guest {
    Guest {
        ram: Pages(2048 * MIB / 4096),
        populated: Pages(600 * MIB / 4096),
        writers: vec![Writer::steady(set_mib * MIB, bytes_per_s), Writer::default()],
        ..Guest::default()
    }
}

/// 500 ms of downtime.
fn settings(policy: &str) -> Settings {
    let mut settings = Settings::new(Pages(0));
    settings.policy = policy.parse().unwrap();
    settings.limits.downtime = Duration::from_millis(500);
    settings
}

/// Over 100 MB/s.
fn migrate(guest: &Guest, settings: Settings) -> Simulated {
    simulate(guest, &Link::steady(100e6), &Machine::default(), settings, PATIENCE)
}

fn floor_s(set_mib: u64) -> f64 {
    ((600 + set_mib) * MIB) as f64 / 100e6
}

/// The prediction after the first round, over what came of it.
fn predicted(done: &Simulated) -> f64 {
    let total = done.predicted_after_round_1.and_then(|prediction| prediction.total);
    total.unwrap_or_default().as_secs_f64() / done.total.as_secs_f64()
}

#[test]
fn a_full_speed_writer_of_30_to_512_mib_is_moved_close_to_the_floor() {
    for (set, limit) in [(30, 1.15), (50, 1.15), (60, 1.15), (100, 1.15), (512, 1.3)] {
        let done = migrate(&guest(set, FULL_SPEED), settings("fair-share"));
        assert_eq!(done.ended, Some(Why::Fits), "{set} MiB");
        let total = done.total.as_secs_f64();
        assert!(total <= limit * floor_s(set), "{set} MiB: {total} s over a floor of {} s", floor_s(set));
        assert!(done.downtime <= Duration::from_millis(500), "{set} MiB: {:?}", done.downtime);
        assert!(done.longest_stall() <= throttle::LONGEST_STALL, "{set} MiB: {:?}", done.longest_stall());
        assert!((0.85..=1.15).contains(&predicted(&done)), "{set} MiB: {}", predicted(&done));
        assert_eq!(done.vcpus[1].throttled, Duration::ZERO, "{set} MiB: the reader");
    }
}

#[test]
fn a_paced_writer_of_512_mib_loses_no_more_than_it_has_to() {
    // MB/s, deadline in s; the most it may take and the writer may lose, in s.
    for (rate, deadline, total_s, lost_s) in [
        (50e6, None, 13.0, 1.0),
        (80e6, None, 30.0, 1.0),
        (80e6, Some(21), 21.0, 2.5),
        (80e6, Some(13), 13.0, 5.5),
        (150e6, None, 14.0, 6.0),
    ] {
        let mut settings = settings("fair-share");
        settings.limits.deadline = deadline.map(Duration::from_secs);
        let done = migrate(&guest(512, rate), settings);
        let case = format!("{rate} {deadline:?}: {:?} lost {:?}", done.total, done.lost());
        assert_eq!(done.ended, Some(Why::Fits), "{case}");
        assert!(done.total.as_secs_f64() <= total_s && done.lost().as_secs_f64() <= lost_s, "{case}");
        assert!(done.longest_stall() <= throttle::LONGEST_STALL, "{case}");
        assert!((0.85..=1.15).contains(&predicted(&done)), "{case} predicted {}", predicted(&done));
        assert_eq!(done.vcpus[1].throttled, Duration::ZERO, "{case}");
    }
}

#[test]
fn a_deadline_a_tenth_above_the_floor_is_met() {
    for (set, rate) in [(60, FULL_SPEED), (100, FULL_SPEED), (512, 80e6), (512, 150e6)] {
        let mut settings = settings("fair-share");
        let deadline = Duration::from_secs_f64(1.1 * floor_s(set));
        settings.limits.deadline = Some(deadline);
        let done = migrate(&guest(set, rate), settings);
        assert!(done.ended == Some(Why::Fits) && done.total <= deadline, "{set} {rate}: {:?}", done.total);
    }
}

#[test]
fn without_throttling_it_is_known_after_the_first_round_that_60_mib_never_end() {
    let done = migrate(&guest(30, FULL_SPEED), settings("none"));
    assert_eq!((done.ended, done.hopeless_since_round), (Some(Why::Fits), None));
    for set in [60, 100, 512] {
        let done = migrate(&guest(set, FULL_SPEED), settings("none"));
        assert_eq!(done.ended, None);
        assert_eq!(done.hopeless_since_round, Some(1));
        assert!(!done.predicted_after_round_1.unwrap().converges);
    }
}

#[test]
fn auto_converge_has_the_published_shape_and_costs_the_writer_four_times_as_much() {
    let run = |set, policy| migrate(&guest(set, FULL_SPEED), settings(policy));
    assert_eq!(run(30, "auto-converge").vcpus[0].throttled, Duration::ZERO);
    let share = |done: &Simulated| {
        let shares = done.events.iter().filter_map(|event| match event.change {
            Change::Throttling { time_share, .. } => time_share,
            _ => None,
        });
        shares.fold(0.0, f64::max)
    };
    for set in [60, 100] {
        let (old, new) = (run(set, "auto-converge"), run(set, "fair-share"));
        assert_eq!(old.ended, Some(Why::Fits));
        assert!((0.8..=0.99).contains(&share(&old)), "{set} MiB: {}", share(&old));
        assert!(new.lost() * 4 <= old.lost(), "{set} MiB: {:?} of {:?}", new.lost(), old.lost());
        assert!(old.vcpus[1].throttled > Duration::from_secs(1), "the reader pays, too");
    }
    // Not of one at 80 MB/s: slowed down by a fifth, it shrinks by itself, and loses less than one that is stopped late.
    let mut with_deadline = settings("fair-share");
    let old = migrate(&guest(512, 150e6), settings("auto-converge"));
    with_deadline.limits.deadline = Some(old.total);
    let new = migrate(&guest(512, 150e6), with_deadline);
    let case = format!("{:?} {:?}", new.lost(), old.lost());
    assert!(new.lost() < old.lost() && new.total <= old.total, "{case}");
}

#[test]
fn no_dirty_limit_costs_the_writer_less() {
    for set in [50, 60, 100] {
        let fair = migrate(&guest(set, FULL_SPEED), settings("fair-share"));
        for bytes_per_s in [1, 5, 20, 50, 80, 100].map(|mb: u64| mb * 1_000_000) {
            let mut settings = settings("dirty-limit");
            settings.policy = Policy::DirtyLimit(DirtyLimit { bytes_per_s });
            let patience = Duration::from_secs(20);
            let limited = simulate(
                &guest(set, FULL_SPEED),
                &Link::steady(100e6),
                &Machine::default(),
                settings,
                patience,
            );
            let lost = (fair.lost(), limited.lost());
            assert!(limited.ended.is_none() || lost.0 < lost.1, "{set} MiB, {bytes_per_s} B/s: {lost:?}");
        }
    }
}

#[test]
fn seven_light_writers_do_not_notice_the_heavy_one() {
    let mut guest = guest(100, FULL_SPEED);
    guest.writers.splice(1.., vec![Writer::steady(8 * MIB, 5e6); 7]);
    let done = migrate(&guest, settings("fair-share"));
    assert_eq!(done.ended, Some(Why::Fits));
    assert!(done.vcpus[0].throttled > Duration::ZERO);
    assert!(done.vcpus[1..].iter().all(|vcpu| vcpu.throttled.is_zero()), "{:?}", done.vcpus);
}

#[test]
fn a_busy_host_that_closes_gates_late_is_noticed_and_answered_with_longer_stalls() {
    let ms = Duration::from_millis;
    let machine = Machine { sample_interval: ms(1), kick: ms(3), ..Machine::default() };
    for (set, rate) in [(60, FULL_SPEED), (100, FULL_SPEED), (512, 150e6)] {
        let done =
            simulate(&guest(set, rate), &Link::steady(100e6), &machine, settings("fair-share"), PATIENCE);
        assert_eq!(done.ended, Some(Why::Fits));
        let total = done.total.as_secs_f64();
        assert!(total < 1.3 * floor_s(set), "{set} MiB: {total} s");
        let longer = done.events.iter().any(|event| matches!(event.change, Change::LongestStall(_)));
        assert!(longer || rate < FULL_SPEED, "{set} MiB");
    }
}

#[test]
fn a_thousand_vcpus_are_moved_over_200_gbit_and_only_the_heavy_ones_pay() {
    let heavy = |index: u32| index.is_multiple_of(8).then(|| Writer::steady(1 << 30, FULL_SPEED));
    let light = Writer::steady(16 * MIB, 5e6);
    let guest = Guest {
        ram: Pages((256 << 30) / 4096),
        populated: Pages((64 << 30) / 4096),
        writers: (0..1024).map(|index| heavy(index).unwrap_or_else(|| light.clone())).collect(),
        ..Guest::default()
    };
    let machine = Machine { sample_interval: Duration::from_millis(10), ..Machine::default() };
    let done = simulate(&guest, &Link::steady(25e9), &machine, settings("fair-share"), PATIENCE);
    assert_eq!(done.ended, Some(Why::Fits));
    assert!(done.downtime <= Duration::from_millis(500));
    let innocent = done.vcpus.iter().enumerate().filter(|(index, _)| index % 8 != 0);
    assert!(innocent.clone().all(|(_, vcpu)| vcpu.throttled.is_zero()));
}

#[test]
fn a_working_set_that_moves_and_a_link_that_stalls_only_delay_the_end() {
    let phase = |from, mib: u64, bytes_per_s: f64, order| Phase {
        from: Duration::from_secs(from),
        pages: Pages(mib * MIB / 4096),
        writes_per_s: bytes_per_s / 4096.0,
        order,
        ..Phase::default()
    };
    let mut guest = guest(30, FULL_SPEED);
    guest.writers[0].phases = vec![
        phase(0, 30, FULL_SPEED, Order::Cyclic),
        phase(5, 200, 120e6, Order::Random),
        phase(9, 400, 90e6, Order::Cyclic),
    ];
    let second = Duration::from_secs;
    let link = Link {
        ripple: 0.3,
        stalls: vec![(second(3), second(5)), (second(9), second(10))],
        ..Link::steady(100e6)
    };
    let done = simulate(&guest, &link, &Machine::default(), settings("fair-share"), PATIENCE);
    assert_eq!(done.ended, Some(Why::Fits));
    assert_eq!(done.vcpus[1].throttled, Duration::ZERO);
    assert!(done.downtime <= Duration::from_millis(700), "{:?}", done.downtime);
}

#[test]
fn a_writer_that_begins_in_the_middle_of_a_round_is_expected_to_go_on() {
    let guest = Guest {
        writers: vec![Writer {
            phases: vec![Phase {
                from: Duration::from_secs(2),
                pages: Pages(106_879),
                writes_per_s: FULL_SPEED,
                order: Order::Cyclic,
                ..Phase::default()
            }],
        }],
        ..guest(0, 0.0)
    };
    let machine = Machine { sample_interval: Duration::from_millis(1), ..Machine::default() };
    let done = simulate(&guest, &Link::steady(142e6), &machine, settings("fair-share"), PATIENCE);
    assert_eq!(done.ended, Some(Why::Fits));
    assert!(done.total < Duration::from_secs(12), "{:?}", done.total);
}

#[test]
fn more_heavy_writers_than_the_link_carries_are_held_below_their_minimum_share_unless_it_was_set_and_then_are_let_run()
 {
    let mut guest = guest(0, 0.0);
    guest.writers = vec![Writer::steady(512 * MIB, FULL_SPEED); 8];
    guest.ram = Pages(8 * 512 * MIB / 4096);
    let mut settings = settings("fair-share");
    let link = Link::steady(50e6);
    let patience = Duration::from_secs(400);
    let done = simulate(&guest, &link, &Machine::default(), settings.clone(), patience);
    assert_eq!(done.ended, Some(Why::Fits), "{:?}", done.rounds);
    assert!(done.events.iter().any(|event| matches!(event.change, Change::MinShare(_))), "{:?}", done.events);
    settings.policy = Policy::FairShare(FairShare { min_share: Some(1.0), ..FairShare::default() });
    let done = simulate(&guest, &link, &Machine::default(), settings.clone(), patience);
    assert_eq!(done.ended, None);
    assert!(done.events.iter().any(|event| event.change == Change::CannotHold), "{:?}", done.events);
    assert!(done.vcpus.iter().all(|vcpu| vcpu.throttled < Duration::from_secs(1)), "nobody, for nothing");
    // A limit ends it with whatever is left then: the less, the better.
    settings.limits.timeout = Some((Duration::from_secs(300), AtTimeout::SwitchOver));
    let done = simulate(&guest, &link, &Machine::default(), settings, patience);
    assert!(done.vcpus.iter().all(|vcpu| vcpu.throttled > Duration::from_secs(1)), "held back all the same");
}

#[test]
fn a_backend_that_cannot_tell_vcpus_apart_throttles_all_by_time_and_says_so() {
    let mut settings = settings("fair-share");
    settings.per_vcpu = false;
    let done = migrate(&guest(60, FULL_SPEED), settings);
    assert_eq!(done.ended, Some(Why::Fits));
    assert!(done.vcpus[1].throttled > Duration::ZERO);
    let by_time =
        |event: &Event| matches!(event.change, Change::Throttling { time_share: Some(_), vcpus: 2, .. });
    assert!(done.events.iter().any(by_time), "{:?}", done.events);
    assert!(done.longest_stall() <= throttle::LONGEST_STALL);
}

#[test]
fn limits_and_policies_change_while_it_runs() {
    let mut controller = Controller::new(settings("none"));
    controller.change(Duration::from_secs(1), |settings| settings.policy = Policy::default());
    controller.change(Duration::from_secs(2), |settings| {
        settings.limits.timeout = Some((Duration::from_secs(3), AtTimeout::Cancel))
    });
    controller.round_started(Duration::from_secs(2), Pages(1000));
    let reached = stop::Reached::Timeout(AtTimeout::Cancel);
    let action = controller.observed(Duration::from_secs(3), &Observation::default());
    assert_eq!(action, Action::GiveUp(reached));
    let events: Vec<Event> = controller.take_events().collect();
    assert_eq!(events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(events[2].change, Change::GaveUp(reached));
}

#[test]
fn the_2011_limits_end_what_does_not_converge() {
    let mut by_rounds = settings("none");
    by_rounds.limits.max_rounds = Some(10);
    let done = migrate(&guest(100, FULL_SPEED), by_rounds);
    assert_eq!((done.ended, done.rounds.len()), (Some(Why::Limit(stop::Reached::MaxRounds)), 10));
    let mut by_bytes = settings("none");
    by_bytes.limits.max_transfer_factor = Some(1.0);
    let done = migrate(&guest(100, FULL_SPEED), by_bytes);
    assert_eq!(done.ended, Some(Why::Limit(stop::Reached::MaxTransfer)));
    assert!(done.bytes >= 2048 * MIB && done.bytes < 2048 * MIB + 200 * MIB);
}

/// It was braked to the depth of its first braked round, in every round, and never arrived.
#[test]
fn a_writer_whose_first_braked_round_was_a_shallow_one_is_braked_down_after_it() {
    let phase = Phase {
        from: Duration::from_secs(2),
        pages: Pages(31_887),
        writes_per_s: 26_159.8,
        order: Order::Random,
        ..Phase::default()
    };
    let writers = vec![Writer { phases: vec![phase] }];
    let guest = Guest { ram: Pages(1 << 20), populated: Pages(150_000), writers, ..Guest::default() };
    let link = Link { ripple: 0.0819, ..Link::steady(60_217_300.0) };
    let machine = Machine { sample_interval: Duration::from_millis(1), ..Machine::default() };
    let done = simulate(&guest, &link, &machine, settings("fair-share"), PATIENCE);
    assert_eq!(done.ended, Some(Why::Fits));
    assert!(done.rounds.len() < 12, "{} rounds", done.rounds.len());
}

fn any_writer() -> impl Strategy<Value = Writer> {
    let phase = (0..20u64, 0..131_072u64, prop_oneof![0.0..60_000.0f64, Just(f64::INFINITY)], any::<bool>());
    prop::collection::vec(phase, 0..3).prop_map(|mut phases| {
        phases.sort_by_key(|phase| phase.0);
        let phase = |(from, pages, writes_per_s, random)| Phase {
            from: Duration::from_secs(from),
            pages: Pages(pages),
            writes_per_s,
            order: if random { Order::Random } else { Order::Cyclic },
            ..Phase::default()
        };
        Writer { phases: phases.into_iter().map(phase).collect() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(debug_assertions) { 6 } else { 48 }, max_shrink_iters: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_guest_is_moved_within_the_downtime_and_the_innocent_never_wait(
        writers in prop::collection::vec(any_writer(), 1..6),
        bytes_per_s in 50e6..1e9f64,
        ripple in 0.0..0.2f64,
    ) {
        let guest = Guest { ram: Pages(1 << 20), populated: Pages(150_000), writers, ..Guest::default() };
        let link = Link { ripple, ..Link::steady(bytes_per_s) };
        let machine = Machine { sample_interval: Duration::from_millis(1), ..Machine::default() };
        let done = simulate(&guest, &link, &machine, settings("fair-share"), PATIENCE * 5);
        prop_assert_eq!(done.ended, Some(Why::Fits));
        // Measured on a crest of the ripple, sent in a trough.
        let varies = (1.0 + ripple) / (1.0 - ripple);
        prop_assert!(done.downtime <= Duration::from_millis(500).mul_f64(varies), "{:?}", done.downtime);
        let longer = done.events.iter().filter_map(|event| match event.change {
            Change::LongestStall(longest) => Some(longest),
            _ => None,
        });
        let longest = longer.max().unwrap_or(throttle::LONGEST_STALL);
        prop_assert!(done.longest_stall() <= longest.mul_f64(throttle::MOST_STRETCH));
        for (writer, vcpu) in guest.writers.iter().zip(&done.vcpus) {
            // Within an equal share of nine tenths of P*, whatever the round.
            let share = 0.4 * bytes_per_s * (1.0 - ripple) * 0.8 / 4112.0 / guest.writers.len() as f64;
            let most: f64 = writer.phases.iter().map(|phase| phase.pages.as_f64()).sum();
            if most < share {
                prop_assert_eq!(vcpu.throttled, Duration::ZERO, "{} pages of {}", most, share);
            }
        }
    }

    #[test]
    fn a_deadline_that_one_braked_round_can_keep_is_kept(
        set in 1_000..131_072u64, writes_per_s in prop_oneof![1_000.0..40_000.0f64, Just(f64::INFINITY)], slack in 1.2..3.0f64,
    ) {
        let phase = Phase { from: Duration::ZERO, pages: Pages(set), writes_per_s, ..Phase::default() };
        let mut guest = guest(0, 0.0);
        guest.writers[0].phases = vec![phase];
        let mut settings = settings("fair-share");
        let deadline = Duration::from_secs_f64((153_600 + set) as f64 * 4096.0 / 100e6 * slack);
        settings.limits.deadline = Some(deadline);
        let done = migrate(&guest, settings);
        prop_assert!(done.ended == Some(Why::Fits) && done.total <= deadline, "{:?} of {:?}", done.total, deadline);
    }

    #[test]
    fn nonsense_neither_panics_nor_keeps_a_guest_stopped(
        steps in prop::collection::vec(
            (0..3u8, any::<u32>(), any::<u64>(), prop::collection::vec((any::<u64>(), any::<u32>()), 0..4), any::<u64>(), any::<u64>()), 1..40),
        policy in 0..4usize,
        (bandwidth, min_share, impatience, ram) in (any::<f64>(), any::<f64>(), any::<f64>(), any::<u64>()),
        (per_vcpu, downtime, deadline) in (any::<bool>(), any::<u64>(), any::<u32>()),
    ) {
        let mut settings = Settings::new(Pages(ram));
        settings.policy = match POLICY_NAMES[policy].parse().unwrap() {
            Policy::FairShare(_) => Policy::FairShare(FairShare { min_share: Some(min_share), impatience, grace: min_share }),
            policy => policy,
        };
        settings.switchover_bandwidth = Some(bandwidth);
        settings.per_vcpu = per_vcpu;
        settings.limits.downtime = Duration::from_micros(downtime);
        settings.limits.deadline = Some(Duration::from_millis(deadline.into()));
        let mut controller = Controller::new(settings);
        let mut now = Duration::ZERO;
        for (what, ms, pages, vcpus, others, bytes) in steps {
            now += Duration::from_millis(ms.into());
            let sample = |(dirtied, ms): &(u64, u32)| VcpuSample { dirtied: Pages(*dirtied), throttled: Duration::from_millis((*ms).into()) };
            let vcpus: Vec<VcpuSample> = vcpus.iter().map(sample).collect();
            let seen = Observation { vcpus: &vcpus, others: Pages(others), pages_done: Pages(pages), pages_struck_off: Pages(others), besides: Pages(0), unprotected: Pages(ram % 2), link: LinkSample { bytes_acked: bytes, ..LinkSample::default() } };
            match what {
                0 => controller.round_started(now, Pages(pages)),
                1 => drop(controller.observed(now, &seen)),
                _ => drop(controller.round_ended(now, &seen)),
            }
            for gate in controller.gates() {
                if let GateState::ClosedUntil(until) = gate {
                    prop_assert!(policy == 1 || until <= now + throttle::LONGEST_STALL_EVER);
                }
            }
        }
        let _ = controller.take_events().count();
    }
}

#[test]
fn a_downtime_limit_that_cannot_be_kept_is_said_before_the_first_round_and_costs_no_thirty_rounds() {
    let mut settings = Settings::new(Pages(1 << 18));
    settings.limits.downtime = Duration::from_millis(20);
    settings.switchover_overhead = Duration::from_millis(28);
    let mut controller = Controller::new(settings);
    controller.round_started(Duration::ZERO, Pages(1000));
    let said: Vec<Change> = controller.take_events().map(|event| event.change).collect();
    let expected =
        Change::DowntimeOutOfReach { limit: Duration::from_millis(20), overhead: Duration::from_millis(28) };
    assert!(said.contains(&expected), "{said:?}");
}

#[test]
fn rounds_of_a_millisecond_hardly_count_against_the_limit_of_rounds() {
    let mut settings = Settings::new(Pages(1 << 18));
    settings.limits.max_rounds = Some(3);
    let mut controller = Controller::new(settings);
    let mut now = Duration::ZERO;
    let mut rounds_of = |length: Duration| {
        for round in 1..1000 {
            controller.round_started(now, Pages(1000));
            now += length;
            let seen = Observation {
                vcpus: &[],
                others: Pages(100_000),
                pages_done: Pages(1000),
                pages_struck_off: Pages(0),
                ..Observation::default()
            };
            if controller.round_ended(now, &seen) != Action::Continue {
                return round;
            }
        }
        1000
    };
    assert_eq!(rounds_of(Duration::from_millis(1)), 60);
    assert_eq!(rounds_of(Duration::from_millis(100)), 1, "the limit was reached");
}

#[test]
fn a_backlog_is_waited_for_and_never_makes_the_limit_give_way() {
    let mut settings = Settings::new(Pages(1 << 18));
    settings.limits.downtime = Duration::from_millis(300);
    settings.switchover_backlog = Duration::from_secs(13);
    let mut controller = Controller::new(settings);
    let nothing = Observation {
        vcpus: &[],
        others: Pages(0),
        pages_done: Pages(1000),
        pages_struck_off: Pages(0),
        besides: Pages(0),
        unprotected: Pages(0),
        link: LinkSample { bytes_acked: 4_096_000, ..LinkSample::default() },
    };
    let round_at = |ms: u64, controller: &mut Controller| {
        controller.round_started(Duration::from_millis(ms), Pages(1000));
        controller.round_ended(Duration::from_millis(ms + 50), &nothing)
    };
    assert_eq!(round_at(0, &mut controller), Action::Continue, "although nothing is left");
    controller.change(Duration::from_millis(60), |settings| {
        settings.switchover_backlog = Duration::from_millis(100)
    });
    assert_eq!(round_at(100, &mut controller), Action::SwitchOver(Why::Fits));
}

/// The machine takes 20 ms for a switchover without a page, and the limit is 500 ms.
#[test]
fn the_guest_stands_still_no_longer_than_it_has_to_where_waiting_costs_it_nothing() {
    // MiB, MB/s, the longest pause in ms beyond those 20, the most it may take.
    for (set, rate, pause_ms, total_s) in [
        (512, 0.0, 2, 6.4),
        (512, 5e6, 5, 6.7),
        (512, 20e6, 10, 7.4),
        (512, 50e6, 15, 10.3),
        // A full-speed writer's set is what is left at the end of any round.
        (30, FULL_SPEED, 335, 6.4),
    ] {
        let done = migrate(&guest(set, rate), settings("fair-share"));
        let case = format!("{set} MiB, {rate}: {:?} of {:?}", done.downtime, done.total);
        assert!(done.downtime <= Duration::from_millis(20 + pause_ms), "{case}");
        assert!(done.total.as_secs_f64() <= total_s, "{case}");
        assert_eq!(done.vcpus[0].throttled, Duration::ZERO, "{case}");
    }
}

#[test]
fn a_shorter_pause_never_costs_the_deadline() {
    let mut with_deadline = settings("fair-share");
    with_deadline.limits.deadline = Some(Duration::from_millis(9_800));
    let done = migrate(&guest(512, 50e6), with_deadline);
    assert!(done.total <= Duration::from_millis(9_800), "{:?}", done.total);
    assert!(done.downtime <= Duration::from_millis(500), "{:?}", done.downtime);
}

#[test]
fn a_wish_for_a_shorter_pause_is_fulfilled_where_it_can_be_and_never_keeps_a_migration_from_its_end() {
    let target = |ms| {
        let mut settings = settings("fair-share");
        settings.limits.downtime_target = Some(Duration::from_millis(ms));
        migrate(&guest(60, FULL_SPEED), settings)
    };
    let done = target(100);
    assert_eq!(done.ended, Some(Why::Fits));
    assert!(done.downtime <= Duration::from_millis(105), "{:?}", done.downtime);
    assert!(done.total <= Duration::from_secs(8), "{:?}", done.total);
    let done = target(1);
    assert_eq!(done.ended, Some(Why::Fits));
    assert!(done.downtime <= Duration::from_millis(500), "{:?}", done.downtime);
    assert!(done.total <= Duration::from_secs(8), "{:?}", done.total);
}
