//! Migrations as their user runs them, in one terminal and in three, and everything that can be wrong with them.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use ringferry::wire::control::Message;
use ringferry::wire::hello::Hello;
use ringferry::{PageIndex, PageRun};
use ringferry_testvm::skip;

use crate::guest::{
    By, Guest, SMALL, SMALL_WORK, assert_failed, closed_port, in_every_way, kvm, receive, whoever_migrates,
};
use crate::support::{
    Running, ringferry, ringferry_as_nobody, ringferry_with_little_locked_memory, ringferry_without_devices,
};

#[test]
fn the_demo_ends_with_one_report_that_has_every_promised_field() {
    if !kvm() {
        return;
    }
    let run = ringferry(&[&["demo", "--json"], &SMALL[..], &SMALL_WORK].concat());
    assert_eq!(run.code, Some(0), "{run:?}");
    let objects = run.objects();
    let report = objects.last().unwrap();
    for (field, value) in
        [("kind", "migration_report"), ("result", "completed"), ("guest", "kvm"), ("backend", "ring")]
    {
        assert_eq!(report[field], value, "{report}");
    }
    assert_eq!(
        (&report["ram_digest_match"], &report["guest_consistent"]),
        (&true.into(), &true.into()),
        "{report}"
    );
    assert_eq!(report["memory_bytes"], 64 << 20);
    let numbers = [
        "channels",
        "total_ms",
        "downtime_ms",
        "pages_sent",
        "zero_pages",
        "bytes_sent",
        "zero_copy_sends",
        "copied_sends",
    ];
    let of_round = [
        "round",
        "pages_to_send",
        "pages_sent",
        "zero_pages",
        "pages_struck_off",
        "bytes_sent",
        "duration_ms",
        "pages_dirtied",
    ];
    let of_vcpu = [
        "index",
        "pages_dirtied",
        "ring_full_exits",
        "throttled_ms",
        "longest_stall_ms",
        "progress_before_per_s",
        "progress_during_per_s",
        "progress_after_per_s",
        "lost_guest_ms",
    ];
    for (object, fields) in
        [(report, &numbers[..]), (&report["rounds"][0], &of_round), (&report["vcpus"][0], &of_vcpu)]
    {
        for field in fields {
            assert!(object[field].is_number(), "{field} in {object}");
        }
    }
}

whoever_migrates! {
    a_guest_moves_between_three_terminals_and_finds_every_write_of_its_own,
    ctrl_c_cancels_the_migration_and_the_guest_runs_on_at_the_source_and_can_move_again,
    nobody_listening_is_told_and_the_guest_runs_on,
    a_destination_that_breaks_off_is_told_and_the_guest_runs_on,
}

in_every_way! {
    a_guest_moves_between_three_terminals_and_finds_every_write_of_its_own,
    ctrl_c_cancels_the_migration_and_the_guest_runs_on_at_the_source_and_can_move_again,
}

fn a_guest_moves_between_three_terminals_and_finds_every_write_of_its_own(by: By) {
    if !kvm() {
        return;
    }
    let guest = Guest::small_for(by);
    let (mut receive, address) = receive(&[]);
    let send = ringferry(&[&guest.send(&address)[..], &["--verify"]].concat());
    assert_eq!(send.code, Some(0), "{send:?}");
    assert!(send.stdout.contains("RAM digests are equal"), "{}", send.stdout);
    assert_eq!(guest.run.end().code, Some(0));
    receive.line_with("received");
    receive.interrupt();
    let receive = receive.end();
    assert_eq!(receive.code, Some(0), "{receive:?}");
    assert_eq!(receive.objects().last().unwrap()["guest_consistent"], true, "{}", receive.stdout);
}

fn ctrl_c_cancels_the_migration_and_the_guest_runs_on_at_the_source_and_can_move_again(by: By) {
    if !kvm() {
        return;
    }
    let mut guest = Guest::small_for(by);
    let (receive, address) = receive(&[]);
    let send = guest.send_slowly(&address);
    send.interrupt();
    assert_failed(&send.end(), &["cancelled"]);
    assert_failed(&receive.end(), &["the source ended the migration", "cancelled"]);
    if by.is_beside() {
        guest.run.line_with("the guest runs on here: cancelled");
    }
    guest.assert_runs();
    guest.assert_moves();
}

#[test]
fn the_terms_of_a_migration_are_adjusted_while_it_runs() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    let adjust = |terms: &[&str]| ringferry(&[&["adjust", "--monitor", &guest.monitor], terms].concat());
    assert_failed(&adjust(&["--downtime-limit", "1s"]), &["no migration is under way"]);
    let (mut receive, to) = receive(&[]);
    // Two minutes at this rate.
    let mut send = Running::start(&[&guest.send(&to)[..], &["--max-bandwidth", "100kB/s"]].concat());
    send.line_with("tracking is on");
    assert_failed(&adjust(&["--dirty-limit", "1MB/s"]), &["goes with policy dirty-limit"]);
    let again = ringferry(&guest.send(&to));
    assert_failed(&again, &["a migration is under way"]);
    let adjusted = adjust(&["--policy", "none", "--downtime-limit", "2s", "--max-bandwidth", "1GB/s"]);
    assert_eq!(adjusted.code, Some(0), "{adjusted:?}");
    send.line_with("policy none, downtime limit 2000 ms");
    let send = send.end();
    assert_eq!(send.code, Some(0), "{send:?}");
    receive.line_with("received");
    receive.interrupt();
    assert_eq!(receive.end().code, Some(0));
}

fn nobody_listening_is_told_and_the_guest_runs_on(by: By) {
    if !kvm() {
        return;
    }
    let guest = Guest::small_for(by);
    let address = closed_port();
    let send = ringferry(&guest.send(&address));
    assert_failed(&send, &[&address, "Connection refused", "is `ringferry receive` running there?"]);
    guest.assert_runs_on();
}

fn a_destination_that_breaks_off_is_told_and_the_guest_runs_on(by: By) {
    if !kvm() {
        return;
    }
    let guest = Guest::small_for(by);
    let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = stranger.local_addr().unwrap().to_string();
    let closing = std::thread::spawn(move || drop(stranger.accept().unwrap()));
    assert_failed(&ringferry(&guest.send(&address)), &["error: "]);
    closing.join().unwrap();
    guest.assert_runs_on();
}

#[test]
fn a_source_of_another_version_is_refused_and_both_sides_say_so() {
    if !kvm() {
        return;
    }
    let (receive, address) = receive(&[]);
    let mut source = TcpStream::connect(address).unwrap();
    let ram = vec![PageRun { first: PageIndex(0), pages: (64 << 20) / 4096 }];
    let hello =
        Hello { newest: 999, oldest: 998, page_bytes: 4096, vcpus: 1, channels: 1, ram, ..Hello::default() };
    std::io::Write::write_all(&mut source, &Message::Hello(hello).encode().unwrap()).unwrap();
    let mut answer = Vec::new();
    source.read_to_end(&mut answer).unwrap();
    let why = "the source speaks protocol 998 to 999";
    assert!(String::from_utf8_lossy(&answer).contains(why));
    receive.interrupt();
    assert_failed(&receive.end(), &[why, "use the same version"]);
}

#[test]
fn a_port_in_use_is_told() {
    if !kvm() {
        return;
    }
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let run = ringferry(&["receive", "--listen", &address]);
    assert_failed(&run, &[&format!("cannot listen on {address}"), "in use"]);
}

#[test]
fn an_address_that_others_can_reach_needs_the_word_insecure() {
    if !kvm() {
        return;
    }
    let exposed_data = ["--listen", "127.0.0.1:0", "--data-listen", "0.0.0.0:0"];
    for listen in [&["--listen", "0.0.0.0:0"][..], &exposed_data] {
        let run = ringferry(&[&["receive"], listen].concat());
        assert_failed(&run, &["neither encrypted nor authenticated", "--insecure"]);
    }
}

#[test]
fn a_receiver_gives_up_when_its_time_is_over() {
    if !kvm() {
        return;
    }
    let (receive, address) = receive(&["--wait", "100ms"]);
    assert_failed(&receive.end(), &[&format!("nobody connected to {address}")]);
}

#[test]
fn a_file_that_is_no_multiboot_image_is_refused() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [text, missing] =
        ["text", "missing"].map(|name| directory.path().join(name).to_str().unwrap().to_owned());
    let monitor = directory.path().join("monitor").to_str().unwrap().to_owned();
    std::fs::write(&text, "no multiboot header, however long one looks").unwrap();
    let run =
        |image: &str| ringferry(&[&["run", "--monitor", &monitor, "--image", image], &SMALL[..]].concat());
    assert_failed(&run(&text), &["no multiboot-1 header"]);
    assert_failed(&run(&missing), &[&missing, "No such file"]);
}

#[test]
fn work_that_does_not_fit_is_refused_with_what_there_is() {
    if !kvm() {
        return;
    }
    let run = ringferry(&[&["demo", "--fill", "1GiB"], &SMALL[..]].concat());
    assert_failed(&run, &["fill need", "give it more, or ask for less"]);
}

#[test]
fn values_that_mean_nothing_exit_with_2_and_say_what_would() {
    for (args, part) in [
        (&["demo", "--memory", "2G"][..], "512MiB"),
        (&["demo", "--memory", "1MiB"], "a multiple of 4096"),
        (&["demo", "--vcpus", "17"], "1..=16"),
        (&["demo", "--ring-entries", "1000"], "a power of two from 256 to 65536"),
        (&["demo", "--work", "each=pattern:odd"], "sequential, random"),
        (&["demo", "--downtime-limit", "5"], "500ms"),
        (&["demo", "--max-bandwidth", "10MB"], "10Gbit/s"),
        (&["demo", "--policy", "odd"], "auto-converge"),
        (&["send"], "--to"),
        (&["receive", "--listen", "7000"], "127.0.0.1:7000"),
    ] {
        let run = ringferry(args);
        assert_eq!(run.code, Some(2), "{args:?}: {run:?}");
        assert!(run.stderr.contains(part), "{args:?}: {part:?} is not in: {}", run.stderr);
    }
}

#[test]
fn send_without_a_running_guest_is_told_where_it_looked() {
    let run = ringferry(&["send", "--monitor", "/no/such/monitor", "--to", "127.0.0.1:1"]);
    assert_failed(&run, &["/no/such/monitor", "no `ringferry run` answers"]);
}

#[test]
fn a_second_run_on_the_same_monitor_is_refused() {
    if !kvm() {
        return;
    }
    let guest = Guest::start();
    let second = ringferry(&[&["run", "--monitor", &guest.monitor], &SMALL[..]].concat());
    assert_failed(&second, &["another `ringferry run` answers", "choose another --monitor"]);
    guest.assert_runs_on();
}

#[test]
fn without_dev_kvm_a_guest_is_refused_and_the_demo_simulates_one_and_says_so() {
    let demo = [&["demo", "--json"], &SMALL[..], &SMALL_WORK].concat();
    let directory = tempfile::tempdir().unwrap();
    let monitor = directory.path().join("monitor").to_str().unwrap().to_owned();
    let (Some(run), Some(demo)) =
        (ringferry_without_devices(&["run", "--monitor", &monitor]), ringferry_without_devices(&demo))
    else {
        return skip("hiding /dev/kvm takes root");
    };
    assert_failed(&run, &["opening /dev/kvm: there is no such device", "modprobe kvm_intel"]);
    assert_eq!(demo.code, Some(0), "{demo:?}");
    let report = demo.objects().pop().unwrap();
    assert_eq!((&report["guest"], &report["backend"]), (&"threads".into(), &"pagemap".into()), "{report}");
    assert_eq!(report["guest_consistent"], true, "{report}");
}

#[test]
fn a_user_who_may_not_open_dev_kvm_is_told_who_may() {
    if !kvm() {
        return;
    }
    let run = [&["demo"], &SMALL[..]].concat();
    let Some(run) = ringferry_as_nobody(&run) else {
        return skip("becoming another user takes root");
    };
    assert_failed(&run, &["opening /dev/kvm: permission denied", "usermod -aG kvm"]);
}

#[test]
fn too_little_locked_memory_costs_copies_and_no_migration() {
    if !kvm() {
        return;
    }
    let demo = [&["demo", "--json"], &SMALL[..], &SMALL_WORK].concat();
    let Some(run) = ringferry_with_little_locked_memory(&demo) else {
        return skip("giving up a capability takes root");
    };
    assert_eq!(run.code, Some(0), "{run:?}");
    assert_eq!(run.objects().last().unwrap()["ram_digest_match"], true);
}

#[test]
fn an_error_is_also_an_object_for_programs() {
    let run = ringferry(&["send", "--json", "--monitor", "/no/such/monitor", "--to", "127.0.0.1:1"]);
    let error = run.objects().pop().unwrap();
    assert_eq!(error["kind"], "error");
    assert!(error["message"].as_str().unwrap().contains("/no/such/monitor"), "{error}");
    assert!(error["causes"].is_array(), "{error}");
}
