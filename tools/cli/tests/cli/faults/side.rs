//! A process of the program that prints JSON objects, seen from outside.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::PROGRAM;

/// How often something is looked for.
pub const POLL: Duration = Duration::from_millis(2);

/// The process. It is killed with the end of this value.
pub struct Side {
    child: Child,
    said: Arc<Mutex<Vec<Value>>>,
    readers: Vec<JoinHandle<()>>,
    stderr: Arc<Mutex<String>>,
}

impl Side {
    /// Starts it with `--json`.
    pub fn start(args: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(args)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let stderr = Arc::new(Mutex::new(String::new()));
        let (stdout, mut errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (objects, text) = (Arc::clone(&said), Arc::clone(&stderr));
        let readers = vec![
            thread::spawn(move || {
                // The last line of a killed process may be cut.
                for object in BufReader::new(stdout).lines().map_while(Result::ok) {
                    objects.lock().unwrap().extend(serde_json::from_str::<Value>(&object).ok());
                }
            }),
            thread::spawn(move || {
                let mut read = String::new();
                let _ = errors.read_to_string(&mut read);
                *text.lock().unwrap() = read;
            }),
        ];
        Self { child, said, readers, stderr }
    }

    /// The objects of this kind that it has printed.
    pub fn said(&self, kind: &str) -> Vec<Value> {
        let said = self.said.lock().unwrap();
        said.iter().filter(|object| object["kind"] == kind).cloned().collect()
    }

    pub fn has_said(&self, kind: &str) -> bool {
        !self.said(kind).is_empty()
    }

    /// Sends a signal; it may have ended.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until it has ended, and all that it said is known.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        wait_for(limit, || self.child.try_wait().unwrap().is_some()).then(|| {
            self.readers.drain(..).for_each(|reader| reader.join().unwrap());
            self.child.wait().unwrap()
        })
    }

    /// Everything that it said, for somebody who looks for the reason.
    pub fn transcript(&self) -> String {
        let said = self.said.lock().unwrap();
        let telling = said.iter().filter(|object| object["kind"] != "progress");
        let objects: Vec<String> =
            telling.map(|object| format!("    {:.300}\n", object.to_string())).collect();
        let last = objects.len().saturating_sub(12);
        format!("{}    stderr: {}", objects[last..].concat(), self.stderr.lock().unwrap().trim_end())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `come`; false if it has not within `limit`.
pub fn wait_for(limit: Duration, mut come: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !come() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL);
    }
    true
}
