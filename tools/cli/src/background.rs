//! Writing that nobody waits for: a thread of its own takes lines from a bounded queue, so that a full disk, a reader
//! that sleeps or a stopped terminal holds up that thread and nothing else.
//!
//! The logs, the standard output of a command that holds a VM, and what a client of the monitor socket is sent are
//! written this way. What is lost is counted, and told at the end.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of progress lines that wait at most: an hour of `ringferry run`.
const PROGRESS_BYTES_MAX: usize = 1 << 20;
/// Bytes of reports that wait at most: two of the longest that the monitor socket carries.
const REPORT_BYTES_MAX: usize = 128 << 20;

/// What a line is worth when its reader is behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Worth {
    /// The oldest line of this kind makes room for the newest.
    Progress,
    /// The line is kept until it is written.
    Report,
}

/// What was not written, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loss {
    /// Lines that are lost.
    pub lines: u64,
    /// The first reason.
    pub cause: String,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lines, cause } = self;
        write!(f, "{cause}; {lines} line{} lost", if *lines == 1 { " was" } else { "s were" })
    }
}

/// The queue and its thread. The thread ends when the value is dropped and everything is written.
#[derive(Debug)]
pub struct Background {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<(Worth, Vec<u8>)>,
    progress_bytes: usize,
    report_bytes: usize,
    /// The thread has taken a line and not yet written it.
    writing: bool,
    /// No more lines will come.
    closed: bool,
    /// The reader has closed its end: nothing is lost that somebody wants.
    reader_gone: bool,
    lost: u64,
    cause: Option<String>,
}

impl Background {
    /// Starts the thread that writes to `out`.
    ///
    /// # Errors
    ///
    /// The kernel gives this process no further thread.
    pub fn new(name: &str, out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        thread::Builder::new().name(name.to_owned()).spawn(move || of_thread.write_all_lines(out))?;
        Ok(Self { shared })
    }

    /// Queues a line, its newline included. Never waits.
    pub fn push(&self, worth: Worth, line: Vec<u8>) {
        self.shared.lock().push(worth, line);
        self.shared.changed.notify_all();
    }

    /// Waits until everything is written, and no longer than `limit`. What is still queued then is given up.
    pub fn finish(&self, limit: Duration) -> Option<Loss> {
        let deadline = Instant::now() + limit;
        let mut queue = self.shared.lock();
        while queue.writing || !queue.lines.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                queue.give_up(limit);
                break;
            }
            let waited = self.shared.changed.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let lines = queue.lost;
        queue.cause.clone().map(|cause| Loss { lines, cause })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// A thread that panicked with the queue locked has left it whole: each change is a few assignments.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: writes line after line until the queue is closed and empty.
    fn write_all_lines(&self, mut out: impl Write) {
        while let Some(line) = self.next_line() {
            let written = out.write_all(&line).and_then(|()| out.flush());
            self.lock().written(written);
            self.changed.notify_all();
        }
    }

    fn next_line(&self) -> Option<Vec<u8>> {
        let mut queue = self.lock();
        loop {
            if let Some(line) = queue.pop() {
                return Some(line);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Queue {
    fn push(&mut self, worth: Worth, line: Vec<u8>) {
        if self.reader_gone {
            return;
        }
        match worth {
            Worth::Progress => {
                self.progress_bytes += line.len();
                self.lines.push_back((worth, line));
                while self.progress_bytes > PROGRESS_BYTES_MAX {
                    self.drop_oldest_progress();
                }
            }
            Worth::Report if self.report_bytes + line.len() > REPORT_BYTES_MAX => {
                self.lose("its reader is too far behind".to_owned());
            }
            Worth::Report => {
                self.report_bytes += line.len();
                self.lines.push_back((worth, line));
            }
        }
    }

    fn drop_oldest_progress(&mut self) {
        let oldest = self.lines.iter().position(|(worth, _)| *worth == Worth::Progress);
        if let Some((_, line)) = oldest.and_then(|oldest| self.lines.remove(oldest)) {
            self.progress_bytes -= line.len();
            self.lose("its reader is too far behind".to_owned());
        }
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let (worth, line) = self.lines.pop_front()?;
        match worth {
            Worth::Progress => self.progress_bytes -= line.len(),
            Worth::Report => self.report_bytes -= line.len(),
        }
        self.writing = true;
        Some(line)
    }

    fn written(&mut self, written: io::Result<()>) {
        self.writing = false;
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.reader_gone = true;
                self.clear();
            }
            // The next line may succeed: a full disk can have room again.
            Err(error) => self.lose(error.to_string()),
        }
    }

    /// Whoever waits for the last lines has waited for `limit`.
    fn give_up(&mut self, limit: Duration) {
        for _ in 0..self.lines.len() + usize::from(self.writing) {
            self.lose(format!("nothing was taken for {} s", limit.as_secs_f32()));
        }
        self.clear();
    }

    fn clear(&mut self) {
        self.lines.clear();
        (self.progress_bytes, self.report_bytes) = (0, 0);
    }

    fn lose(&mut self, cause: String) {
        self.lost += 1;
        self.cause.get_or_insert(cause);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, SyncSender};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn line(text: &str) -> Vec<u8> {
        text.as_bytes().to_vec()
    }

    /// Hands over what it is given, one write at a time, and blocks while nobody takes it.
    struct Slow(SyncSender<Vec<u8>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Background, Receiver<Vec<u8>>) {
        let (sender, receiver) = mpsc::sync_channel(0);
        (Background::new("slow", Slow(sender)).unwrap(), receiver)
    }

    #[test]
    fn lines_arrive_in_order_and_nothing_is_lost() {
        let (background, taken) = slow();
        let taking = thread::spawn(move || taken.iter().collect::<Vec<_>>().concat());
        for (worth, text) in [(Worth::Progress, "1\n"), (Worth::Report, "2\n"), (Worth::Progress, "3\n")] {
            background.push(worth, line(text));
        }
        assert_eq!(background.finish(SOON), None);
        drop(background);
        assert_eq!(taking.join().unwrap(), b"1\n2\n3\n");
    }

    #[test]
    fn a_reader_that_sleeps_costs_the_oldest_progress_and_no_report() {
        let (background, taken) = slow();
        background.push(Worth::Report, line("first"));
        for number in 0..5 {
            let mut text = vec![b'.'; PROGRESS_BYTES_MAX / 2 - 1];
            text.push(b'0' + number);
            background.push(Worth::Progress, text);
        }
        background.push(Worth::Report, line("last"));
        let taking = thread::spawn(move || taken.iter().map(|line| line.last().copied()).collect::<Vec<_>>());
        let loss = background.finish(SOON).unwrap();
        assert_eq!(loss.lines, 3, "{loss}");
        drop(background);
        assert_eq!(taking.join().unwrap(), [b't', b'3', b'4', b't'].map(Some));
    }

    #[test]
    fn a_reader_that_never_wakes_is_waited_for_no_longer_than_allowed_and_what_it_missed_is_counted() {
        let (background, _asleep) = slow();
        for _ in 0..3 {
            background.push(Worth::Report, line("report\n"));
        }
        let loss = background.finish(Duration::from_millis(50)).unwrap();
        assert_eq!(loss.to_string(), "nothing was taken for 0.05 s; 3 lines were lost");
    }

    #[test]
    fn a_reader_that_goes_away_loses_nothing_that_it_wants() {
        let (background, taken) = slow();
        drop(taken);
        background.push(Worth::Report, line("report\n"));
        assert_eq!(background.finish(SOON), None);
    }

    #[test]
    fn each_line_that_a_full_disk_refuses_is_counted_and_the_first_reason_is_told() {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let background = Background::new("full", full).unwrap();
        background.push(Worth::Progress, line("1\n"));
        background.push(Worth::Report, line("2\n"));
        let loss = background.finish(SOON).unwrap();
        assert_eq!(loss.lines, 2);
        assert!(loss.cause.contains("No space left"), "{loss}");
    }

    #[test]
    fn reports_that_nobody_takes_have_a_bound_too() {
        let mut queue = Queue::default();
        for _ in 0..3 {
            queue.push(Worth::Report, vec![b'.'; REPORT_BYTES_MAX / 2]);
        }
        assert_eq!((queue.lines.len(), queue.lost), (2, 1));
    }
}
