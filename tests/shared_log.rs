//! A writer in another process and its log: what it writes while pages are copied arrives, whether it ends or is killed.
#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ringferry::kvm::RingSize;
use ringferry::layout::PAGE_SIZE;
use ringferry::testing::FakeKernel;
use ringferry::track::DirtyTracker;
use ringferry::track::external::{SharedLog, SharedLogWriter};
use ringferry::{PageIndex, PageRun, PageSet, SlotId};

/// The pages that the other process writes; neither end is a multiple of 64.
const RUN: PageRun = PageRun { first: PageIndex(1000), pages: 500 };
/// The word in the file of pages by which the other process is told to end, and the one in which it counts its writes.
const STOP: u64 = 0;
const WRITES: u64 = 8;
const PATIENCE: Duration = Duration::from_secs(60);

fn word(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).unwrap();
    u64::from_le_bytes(bytes)
}

fn set_word(file: &File, at: u64, value: u64) {
    file.write_all_at(&value.to_le_bytes(), at).unwrap();
}

fn offset(page: u64) -> u64 {
    page * PAGE_SIZE as u64
}

/// The other process of the other tests here: writes a page, marks it, and goes on with another, until it is told to end. In
/// the first process, which is not told of any file, it has nothing to do.
#[test]
fn the_other_process_writes_and_marks() {
    let (Ok(pages), Ok(log)) = (std::env::var("SHARED_LOG_PAGES"), std::env::var("SHARED_LOG_FILE")) else {
        return;
    };
    let open = |path| OpenOptions::new().read(true).write(true).open(path).unwrap();
    let (pages, writer) = (open(pages), SharedLogWriter::open(open(log)).unwrap());
    let began = Instant::now();
    for turn in 1.. {
        if word(&pages, STOP) != 0 || began.elapsed() > PATIENCE {
            return;
        }
        // Each page in its turn, not in their order.
        let page = writer.run().first.0 + turn * 7 % writer.run().pages;
        set_word(&pages, offset(page) + turn % 512 * 8, turn);
        writer.mark(PageRun { first: PageIndex(page), pages: 1 });
        set_word(&pages, WRITES, turn);
    }
}

struct Other {
    process: Child,
    pages: File,
}

impl Other {
    fn start(log: &SharedLog) -> Self {
        let pages = tempfile();
        pages.set_len(offset(RUN.end().0)).unwrap();
        // The same files, opened anew.
        let path = |file: &dyn AsFd| format!("/proc/{}/fd/{}", std::process::id(), file.as_fd().as_raw_fd());
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_other_process_writes_and_marks"])
            .env("SHARED_LOG_PAGES", path(&pages))
            .env("SHARED_LOG_FILE", path(&log.file()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, pages }
    }

    /// Returns when it has written so many pages more.
    fn wait_for_writes(&self, more: u64) {
        let (began, before) = (Instant::now(), word(&self.pages, WRITES));
        while word(&self.pages, WRITES) < before + more {
            assert!(began.elapsed() < PATIENCE, "the other process does not write");
            thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // One that has ended cannot be killed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A file without a name.
fn tempfile() -> File {
    let path = std::env::temp_dir().join(format!("ringferry-shared-log-{:?}", thread::current().id()));
    let path = path.with_extension(std::process::id().to_string());
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

/// Copies pages in rounds while the other process writes, then as `end` has it, and returns how many differ.
fn copied(end: impl FnOnce(&mut Other)) -> usize {
    let kernel = FakeKernel::new();
    let tracker = DirtyTracker::on_fake_rings(&kernel, RingSize::MIN);
    tracker.add_memory(&kernel.create_slot(SlotId(1), RUN)).unwrap();
    let log = SharedLog::new(RUN).unwrap();
    let mut other = Other::start(&log);
    tracker.add_external(Box::new(log)).unwrap();
    other.wait_for_writes(1);

    let session = tracker.start().unwrap();
    let mut copy = vec![[0; PAGE_SIZE]; usize::try_from(RUN.pages).unwrap()];
    let read = |pages: &File, page: u64| {
        let mut bytes = [0; PAGE_SIZE];
        pages.read_exact_at(&mut bytes, offset(page)).unwrap();
        bytes
    };
    let mut dirty = PageSet::new(RUN.end());
    dirty.insert_run(RUN);
    let mut round = |pages: &File, dirty: &mut PageSet| {
        for page in dirty.runs().flat_map(|run| run.first.0..run.end().0) {
            copy[usize::try_from(page - RUN.first.0).unwrap()] = read(pages, page);
        }
        let sent = dirty.len();
        dirty.clear();
        session.harvest(dirty).unwrap();
        sent
    };
    round(&other.pages, &mut dirty);
    let mut sent = 0;
    for _ in 0..50 {
        other.wait_for_writes(20);
        sent += round(&other.pages, &mut dirty);
    }
    assert!(sent >= 49 * 20, "{sent} pages sent again");
    end(&mut other);
    round(&other.pages, &mut dirty);
    round(&other.pages, &mut dirty);
    assert!(dirty.is_empty(), "nobody writes any more");
    (RUN.first.0..).zip(&copy).filter(|(page, copy)| read(&other.pages, *page) != **copy).count()
}

#[test]
fn what_another_process_writes_and_marks_while_pages_are_copied_arrives() {
    let differ = copied(|other| {
        set_word(&other.pages, STOP, 1);
        assert!(other.process.wait().unwrap().success());
    });
    assert_eq!(differ, 0);
}

#[test]
fn what_a_killed_process_had_marked_arrives_too() {
    let differ = copied(|other| {
        other.process.kill().unwrap();
        other.process.wait().unwrap();
    });
    assert!(differ <= 1, "{differ} pages differ; the one that it was at when it died may");
}
