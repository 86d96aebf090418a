//! A real VM migrates between two network namespaces: over two links, one of which falls silent in the middle, and over
//! one that is too slow for what its vCPUs write.

use std::sync::{Mutex, PoisonError};

use ringferry_testvm::links::{Links, MTU};
use ringferry_testvm::skip;
use serde_json::Value;

use crate::guest::{By, Guest, whoever_migrates};
use crate::support::{Running, ringferry};

/// Unoptimized, a comparison of RAM takes seconds.
const PATIENTLY: [&str; 2] = ["--standstill-floor", "60s"];

/// Two shaped links for data, and a third for control.
fn links(name: &str) -> std::io::Result<Links> {
    let links = Links::new(name)?;
    links.add(1, Some(125_000_000), MTU)?;
    links.add(2, Some(62_500_000), MTU)?;
    links.add(3, None, MTU)?;
    Ok(links)
}

whoever_migrates! {
    a_vm_arrives_whole_although_one_of_its_two_links_falls_silent_and_the_report_says_which_when_and_how_much,
}

fn a_vm_arrives_whole_although_one_of_its_two_links_falls_silent_and_the_report_says_which_when_and_how_much(
    by: By,
) {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return skip(&format!("/dev/kvm cannot be opened: {error}"));
    }
    let links = match links(if by.is_beside() { "cli-beside" } else { "cli" }) {
        Ok(links) => links,
        Err(reason) => return skip(&format!("namespaces with shaped links cannot be made here: {reason}")),
    };
    let vm = ["--memory", "512MiB", "--vcpus", "2"];
    let work = ["--fill", "384MiB", "--work", "each=ws:4MiB,pace:2000"];
    let guest = Guest::start_by(by, |run| Running::start_in(links.near(), &[run, &vm, &work].concat()));
    let listen = ["--listen", "10.77.3.2:7000", "--data-listen", "10.77.1.2:7001"];
    let more = ["--data-listen", "10.77.2.2:7002", "--insecure", "--run-for", "1s"];
    let mut receive = Running::start_in(links.far(), &[&["receive", "--json"], &listen[..], &more].concat());
    receive.line_with("listening");
    let channels = ["--channel", "10.77.1.1%v1=10.77.1.2:7001", "--channel", "10.77.2.1%v2=10.77.2.2:7002"];
    let send = [&guest.send("10.77.3.2:7000")[..], &["--json", "--verify"]].concat();
    let send = Running::start_in(links.near(), &[&send[..], &channels, &PATIENTLY].concat());
    // The first round takes two seconds or more: 384 MiB over 1.5 Gbit/s.
    std::thread::sleep(std::time::Duration::from_millis(900));
    links.cut(2).unwrap();
    let sent = send.end();
    assert_eq!(sent.code, Some(0), "{sent:?}");
    let report = sent.objects().into_iter().find(|object| object["kind"] == "migration_report").unwrap();
    assert_eq!(report["result"], "completed", "{report}");
    assert_eq!(report["ram_digest_match"], true, "{report}");
    let channels = report["channel_reports"].as_array().unwrap();
    assert_eq!(channels[0]["losses"], Value::Array(Vec::new()), "{report}");
    let losses = channels[1]["losses"].as_array().unwrap();
    assert!(channels[1]["channel"].as_str().unwrap().contains("%v2="), "{report}");
    assert_eq!(losses.len(), 1, "{report}");
    assert!(
        losses[0]["at_ms"].as_f64().unwrap() > 0.0 && losses[0]["round"].as_u64().unwrap() >= 1,
        "{report}"
    );
    assert!(losses[0]["pages_sent_again"].as_u64().unwrap() > 0, "{report}");
    let received = receive.end();
    assert_eq!(received.code, Some(0), "{received:?}");
    assert!(received.stdout.contains("\"guest_consistent\":true"), "{received:?}");
    drop(guest);
}

/// Two write at full speed over working sets of different size, two write little. The link is fast enough for neither to
/// dirty all of its set in a round while it is held back, on a busy machine either.
const SHARED: &str = r#"
description = "four vCPUs"
[guest]
memory = "512MiB"
fill = "64MiB"
vcpus = [
    "pattern:sequential,ws:60MiB,bytes:16,content:counter",
    "pattern:sequential,ws:120MiB,bytes:16,content:counter",
    "pattern:sequential,ws:4MiB,bytes:16,content:counter,pace:1220",
    "pattern:sequential,ws:4MiB,bytes:16,content:counter,pace:1220",
]
[link]
rate = "200MB/s"
[limits]
downtime = "150ms"
min_share = 40
max_rounds = 5
"#;

/// The report of a scenario; nothing where it cannot be run.
fn report_of(scenario: &str, gates: &str) -> Option<Value> {
    // One at a time: what they measure suffers from each other.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        skip(&format!("/dev/kvm cannot be opened: {error}"));
        return None;
    }
    if let Err(reason) = Links::new("probe").and_then(|links| links.add(1, Some(100_000_000), MTU)) {
        skip(&format!("namespaces with shaped links cannot be made here: {reason}"));
        return None;
    }
    let run = ringferry(
        &[&["bench", "migrate", "--json", "--scenario", scenario, "--gates", gates][..], &PATIENTLY].concat(),
    );
    assert_eq!(run.code, Some(0), "{run:?}");
    let report = run.objects().into_iter().find(|object| object["kind"] == "migration_report").unwrap();
    assert_eq!(
        (&report["result"], &report["ram_digest_match"], &report["guest_consistent"]),
        (&"completed".into(), &true.into(), &true.into()),
        "{report}"
    );
    Some(report)
}

#[test]
fn a_heavy_writer_is_held_back_without_the_lock_that_the_other_vcpus_want() {
    let Some(report) = report_of("shared-spinlock", "by-mode") else { return };
    let of = |vcpu: usize, field: &str| report["vcpus"][vcpu][field].as_f64();
    assert!(of(0, "throttled_ms") > Some(0.0) && of(0, "stalls_put_off") > Some(0.0), "{report}");
    // Half of its work is done with the lock.
    assert!(of(0, "stalls_in_kernel_share").is_some_and(|share| share < 0.4), "{report}");
    // How fast they go beside it is for `bench migrate --scenario shared-spinlock` to say, on a host at rest.
    for other in 1..4 {
        assert_eq!(of(other, "throttled_ms"), Some(0.0), "{report}");
        assert!(of(other, "progress_during_per_s") > Some(0.0), "{report}");
    }
}

#[test]
fn two_heavy_writers_are_held_to_the_same_number_of_pages_and_light_ones_are_not_held() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), SHARED).unwrap();
    let Some(report) = report_of(file.path().to_str().unwrap(), "kicked") else { return };
    let throttled = |vcpu: usize| report["vcpus"][vcpu]["throttled_ms"].as_f64().unwrap();
    assert!(throttled(0) > 0.0 && throttled(1) > 0.0, "{report}");
    assert_eq!((throttled(2), throttled(3)), (0.0, 0.0), "{report}");
    // Held back, neither dirties all of its working set; from the third round on both are above their share of the link.
    let rounds = report["rounds"].as_array().unwrap().iter().skip(2);
    let dirtied = rounds.filter_map(|round| {
        let vcpus = round["vcpu_pages_dirtied"].as_array()?;
        Some((vcpus.first()?.as_u64()?, vcpus.get(1)?.as_u64()?))
    });
    let held = dirtied.filter(|(one, other)| *one < 15_000 && *other < 30_000);
    let (one, other) = held.fold((0, 0), |(one, other), (a, b)| (one + a, other + b));
    assert!(one > 0 && other > 0, "{report}");
    // Within 10 % on a host that is at rest; a CI machine is not.
    assert!(one * 2 > other && other * 2 > one, "{one} and {other} pages: {report}");
}
