//! `ringferry bench track`: one truthful object per case, and a picture.

use crate::support::{ringferry, ringferry_without_devices};

#[test]
fn each_case_is_one_object_with_every_figure_that_its_backend_has() {
    let directory = tempfile::tempdir().unwrap();
    let picture = directory.path().join("track.svg");
    let run = ringferry(&[
        "bench",
        "track",
        "--json",
        "--memory",
        "2GiB,1GiB",
        "--dirty-pages",
        "300",
        "--vcpus",
        "1,2",
        "--rounds",
        "2",
        "--guest-time",
        "10ms",
        "--plot",
        picture.to_str().unwrap(),
    ]);
    if std::fs::File::open("/dev/kvm").is_err() {
        ringferry_testvm::skip("no /dev/kvm");
        return;
    }
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let objects = run.objects();
    assert_eq!(objects.len(), 2 * 2 * 2 * 2);
    for object in &objects {
        assert_eq!((&object["kind"], &object["dirty_pages"]), (&"bench_track".into(), &300.into()));
        for figure in [
            "harvest_ns_per_page",
            "reset_ns_per_page",
            "sync_us_median",
            "sync_us_p99",
            "guest_page_writes_per_s",
            "start_us",
            "stop_us",
        ] {
            assert!(object[figure].as_f64().unwrap() > 0.0, "{figure} of {object}");
        }
        // On a busy host the guest may not have run at all meanwhile.
        assert!(object["longest_stall_us"].as_f64().unwrap() >= 0.0, "{object}");
        assert_eq!(object["observe_ns_per_page"].is_null(), object["backend"] == "bitmap", "{object}");
        assert!(object["sync_us_p99"].as_f64() >= object["sync_us_median"].as_f64(), "{object}");
    }
    assert!(std::fs::read_to_string(picture).unwrap().contains("</svg>"));
}

#[test]
fn cross_checked_what_the_kernel_pushed_is_what_the_tracker_took() {
    let measured = [
        "bench",
        "track",
        "--memory",
        "1GiB",
        "--dirty-pages",
        "3000",
        "--rounds",
        "2",
        "--guest-time",
        "10ms",
    ];
    let run = ringferry(&[&measured[..], &["--vcpus", "2", "--cross-check", "--json"]].concat());
    if std::fs::File::open("/dev/kvm").is_err() {
        ringferry_testvm::skip("no /dev/kvm");
        return;
    }
    if run.stderr.contains("cargo build -p ringferry-bpf") || run.stderr.contains("CAP_BPF") {
        ringferry_testvm::skip(&run.stderr);
        return;
    }
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let kinds: Vec<_> =
        run.objects().iter().map(|object| object["kind"].as_str().unwrap().to_owned()).collect();
    // For each pattern the ring, its check, and the bitmap, which pushes nothing.
    assert_eq!(kinds, ["bench_track", "cross_check", "bench_track"].repeat(2));
    for check in run.objects().iter().filter(|object| object["kind"] == "cross_check") {
        assert_eq!((&check["equal"], check["vcpus"].as_array().unwrap().len()), (&true.into(), 2));
        for vcpu in check["vcpus"].as_array().unwrap() {
            assert_eq!(vcpu["kernel_pushes"], vcpu["library_entries"]);
            assert!(vcpu["kernel_pushes"].as_u64() >= Some(3 * 1500), "{vcpu}");
        }
    }
}

#[test]
fn what_cannot_be_cross_checked_is_said_before_anything_is_measured() {
    let run = ringferry(&["bench", "track", "--backend", "bitmap", "--cross-check"]);
    assert!(run.code == Some(1) && run.stdout.is_empty(), "{}", run.stdout);
    let reason = if std::fs::File::open("/dev/kvm").is_ok() { "--backend ring" } else { "/dev/kvm" };
    assert!(run.stderr.contains(reason), "{}", run.stderr);
    let run = ringferry(&["demo", "--guest", "threads", "--cross-check"]);
    assert!(run.code == Some(1) && run.stdout.is_empty(), "{}", run.stdout);
    assert!(run.stderr.contains("this guest has none"), "{}", run.stderr);
}

#[test]
fn what_cannot_be_measured_is_said() {
    let run = ringferry(&["bench", "track", "--memory", "1MiB", "--dirty-pages", "257"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("257") && run.stderr.contains("1MiB"), "{}", run.stderr);
    let run = ringferry(&["bench", "track", "--ring-entries", "1000"]);
    assert!(run.code == Some(1) && run.stderr.contains("power of two"), "{}", run.stderr);
    if let Some(run) = ringferry_without_devices(&["bench", "track"]) {
        assert!(run.code == Some(1) && run.stderr.contains("/dev/kvm"), "{}", run.stderr);
    }
}
