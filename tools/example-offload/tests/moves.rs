//! The example really moves its guest, by two processes beside its two VMMs.
#![expect(clippy::unwrap_used, reason = "what a test arranges must be there")]

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};

struct Running(Child, Lines<BufReader<ChildStdout>>);

impl Running {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringferry-example-offload"));
        let mut child = command.args(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self(child, lines)
    }

    fn line(&mut self) -> String {
        self.1.next().expect("it said nothing more").unwrap()
    }

    fn end(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_example_moves_its_guest_by_processes_beside_both_vmms() {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return ringferry_testvm::skip(&format!("/dev/kvm: {error}"));
    }
    let path = |side: &str| {
        let name = format!("ringferry-example-{side}-{}", std::process::id());
        std::env::temp_dir().join(name).to_str().unwrap().to_owned()
    };
    let (at_source, at_destination) = (path("source"), path("destination"));
    let mut source = Running::start(&["source", &at_source]);
    let mut destination = Running::start(&["destination", &at_destination]);
    assert_eq!((source.line(), destination.line()), ("waiting".to_owned(), "waiting".to_owned()));
    let mut receive = Running::start(&["receive", &at_destination]);
    let to = receive.line();
    let mut send = Running::start(&["send", &at_source, &to]);
    let sent = send.line();
    assert!(sent.starts_with("Moved: "), "{sent}");
    let moved = source.line();
    assert!(moved.starts_with("moved after pass "), "{moved}");
    let came = destination.line();
    assert!(came.ends_with("goes on: true; whole: true"), "{came}");
    [send, receive, source, destination].into_iter().for_each(Running::end);
}
