//! `ringferry bench send`: one truthful object per case.

use ringferry_testvm::links::Links;
use ringferry_testvm::skip;

use crate::support::ringferry;

#[test]
fn each_case_is_one_object_and_on_loopback_nothing_is_called_zero_copied() {
    let run = ringferry(&[
        "bench",
        "send",
        "--json",
        "--bytes",
        "8MiB",
        "--repeat",
        "1",
        "--mode",
        "auto,copy,zc,zc_fixed",
        "--channels",
        "1,2",
        "--run-pages",
        "0,1",
    ]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let objects = run.objects();
    assert_eq!(objects.len(), 16);
    for object in &objects {
        assert_eq!(
            (object["kind"].as_str(), object["zero_copy_sends"].as_u64()),
            (Some("bench_send"), Some(0))
        );
        assert_eq!(object["bytes"], 8 << 20);
        assert!(object["copied_sends"].as_u64().unwrap() > 0, "{object}");
        for rate in
            ["bytes_per_s", "raw_ceiling_bytes_per_s", "sender_cpu_s_per_gib", "receiver_cpu_s_per_gib"]
        {
            assert!(object[rate].as_f64().unwrap() > 0.0, "{rate} of {object}");
        }
        let registered = object["registered_bytes"].as_u64().unwrap() > 0;
        assert_eq!(registered, object["mode"] == "zc_fixed", "{object}");
    }
}

#[test]
fn links_are_made_for_the_occasion_and_each_is_a_channel() {
    if let Err(reason) = Links::new("can-make") {
        return skip(&format!("network namespaces cannot be made here: {reason}"));
    }
    let run = ringferry(&[
        "bench",
        "send",
        "--json",
        "--bytes",
        "8MiB",
        "--repeat",
        "1",
        "--mode",
        "auto",
        "--link",
        "1Gbit/s,500Mbit/s",
    ]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let object = &run.objects()[0];
    assert_eq!(
        (object["channels"].as_u64(), object["lost_channels"].as_u64()),
        (Some(2), Some(0)),
        "{object}"
    );
    let bytes = object["per_channel_bytes"].as_array().unwrap();
    assert!(bytes.len() == 2 && bytes.iter().all(|bytes| bytes.as_u64() > Some(0)), "{object}");
}

#[test]
fn wrong_use_is_told_what_to_do() {
    let nobody = ringferry(&["bench", "send", "--to", "127.0.0.1:1", "--channel", "127.0.0.1:2"]);
    assert_eq!(nobody.code, Some(1));
    assert!(nobody.stderr.contains("--listen"), "{}", nobody.stderr);
    let no_channel = ringferry(&["bench", "send", "--channel", "127.0.0.1:2"]);
    assert_eq!(no_channel.code, Some(2), "{}", no_channel.stderr);
    let no_spec = ringferry(&["bench", "send", "--to", "127.0.0.1:1", "--channel", "eth1"]);
    assert_eq!(no_spec.code, Some(2));
    assert!(no_spec.stderr.contains("192.0.2.9:4444"), "{}", no_spec.stderr);
}
