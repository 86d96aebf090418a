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
