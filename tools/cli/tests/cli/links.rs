//! A real VM migrates over two links at once, between two network namespaces, and one of the links falls silent in
//! the middle.

use std::process::{Command, Stdio};

use ringferry_testvm::skip;
use serde_json::Value;

use crate::support::Running;

/// Two namespaces with three links: two shaped ones for data, numbered 1 and 2, and a third for control.
struct Links {
    near: String,
    far: String,
}

fn run(command: &str) -> Result<(), String> {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    match Command::new(program).args(words).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("`{command}`: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("`{command}`: {error}")),
    }
}

impl Links {
    fn new() -> Result<Self, String> {
        let of = |side: &str| format!("ringferry-cli-{side}-{}", std::process::id());
        let links = Self { near: of("near"), far: of("far") };
        let Self { near, far } = &links;
        run(&format!("ip netns add {near}"))?;
        run(&format!("ip netns add {far}"))?;
        for (n, rate) in [(1, Some("1gbit")), (2, Some("500mbit")), (3, None)] {
            run(&format!("ip link add v{n} netns {near} type veth peer name v{n} netns {far}"))?;
            run(&format!("ip -n {near} address add 10.79.{n}.1/24 dev v{n}"))?;
            run(&format!("ip -n {far} address add 10.79.{n}.2/24 dev v{n}"))?;
            run(&format!("ip -n {near} link set v{n} up"))?;
            run(&format!("ip -n {far} link set v{n} up"))?;
            if let Some(rate) = rate {
                let shape = format!("root tbf rate {rate} burst 256kb latency 50ms");
                run(&format!("tc -n {near} qdisc add dev v{n} {shape}"))?;
            }
        }
        Ok(links)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        let _ =
            (run(&format!("ip netns delete {}", self.near)), run(&format!("ip netns delete {}", self.far)));
    }
}

#[test]
fn a_vm_arrives_whole_although_one_of_its_two_links_falls_silent_and_the_report_says_which_when_and_how_much()
{
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return skip(&format!("/dev/kvm cannot be opened: {error}"));
    }
    let links = match Links::new() {
        Ok(links) => links,
        Err(reason) => return skip(&format!("namespaces with shaped links cannot be made here: {reason}")),
    };
    let directory = tempfile::tempdir().unwrap();
    let monitor = directory.path().join("monitor").to_str().unwrap().to_owned();
    let vm = ["--memory", "512MiB", "--vcpus", "2"];
    let work = ["--fill", "384MiB", "--work", "each=ws:4MiB,pace:2000"];
    let mut guest =
        Running::start_in(&links.near, &[&["run", "--monitor", &monitor], &vm[..], &work].concat());
    guest.line_with("steps: ");
    let listen = ["--listen", "10.79.3.2:7000", "--data-listen", "10.79.1.2:7001"];
    let more = ["--data-listen", "10.79.2.2:7002", "--insecure", "--run-for", "1s"];
    let mut receive =
        Running::start_in(&links.far, &[&["receive", "--json"], &listen[..], &more, &vm].concat());
    receive.line_with("listening");
    let channels = ["--channel", "10.79.1.1%v1=10.79.1.2:7001", "--channel", "10.79.2.1%v2=10.79.2.2:7002"];
    let send = ["send", "--json", "--monitor", &monitor, "--to", "10.79.3.2:7000"];
    let send = Running::start_in(&links.near, &[&send[..], &channels].concat());
    // The first round takes two seconds or more: 384 MiB over 1.5 Gbit/s.
    std::thread::sleep(std::time::Duration::from_millis(900));
    run(&format!("ip -n {} link set v2 down", links.near)).unwrap();
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
