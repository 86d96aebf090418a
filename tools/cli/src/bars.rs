//! The live display of a migration on a terminal. A thread of its own draws it, because a terminal can be stopped
//! (Ctrl-S), and nobody waits for one.

use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use indicatif::{HumanCount, MultiProgress, ProgressBar, ProgressStyle};
use ringferry::PAGE_SIZE;
use ringferry::progress::{Phase, Status};

use crate::display::{binary_bytes, expectation};

/// What waits to be drawn at most; what comes while so much waits is not drawn.
const WAITING_MAX: usize = 64;
/// How long the end waits for the last line to be drawn.
const LAST_LINE: Duration = Duration::from_secs(1);

/// What is drawn.
pub enum Drawn {
    /// The bars.
    Status(Status),
    /// A line that stays, above them.
    Line(String),
}

/// The bars, and the thread that draws them. They go when this value does.
pub struct Bars {
    /// Closed by dropping it.
    waiting: Option<SyncSender<Drawn>>,
    /// Closed by the thread when it has drawn everything.
    drawn: Receiver<()>,
}

impl Bars {
    /// Starts the display. Where there is no thread for it, nothing is shown.
    pub fn start() -> Self {
        let (sender, waiting) = mpsc::sync_channel(WAITING_MAX);
        let (at_work, drawn) = mpsc::channel();
        let draw = move || {
            let _at_work: mpsc::Sender<()> = at_work;
            draw_all(&waiting);
        };
        if let Err(error) = thread::Builder::new().name("display".to_owned()).spawn(draw) {
            tracing::warn!(%error, "the display has no thread");
        }
        Self { waiting: Some(sender), drawn }
    }

    /// Shows it, unless the terminal is far behind. Never waits.
    pub fn show(&self, drawn: Drawn) {
        if let Some(waiting) = &self.waiting {
            // A display that is behind is not made to lie further behind.
            let _ = waiting.try_send(drawn);
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.waiting = None;
        // It has ended, or the terminal is stopped: both are an end.
        let _ = self.drawn.recv_timeout(LAST_LINE);
    }
}

fn draw_all(waiting: &Receiver<Drawn>) {
    let picture = Picture::new();
    for drawn in waiting {
        match drawn {
            Drawn::Status(status) => picture.draw(&status),
            Drawn::Line(text) => {
                if let Err(error) = picture.all.println(text) {
                    tracing::warn!(%error, "progress could not be shown");
                }
            }
        }
    }
    // Nobody is left to be told if the terminal is gone.
    let _ = picture.all.clear();
}

/// What `indicatif` draws.
struct Picture {
    all: MultiProgress,
    round: ProgressBar,
    vcpus: ProgressBar,
    prediction: ProgressBar,
}

impl Picture {
    fn new() -> Self {
        let all = MultiProgress::new();
        let line = || {
            let style = ProgressStyle::with_template("  {wide_msg}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        };
        let style = ProgressStyle::with_template("  {prefix:9} {bar:30} {percent:>3} %  {wide_msg}");
        let round = ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let (round, vcpus, prediction) = (all.add(round), all.add(line()), all.add(line()));
        Self { all, round, vcpus, prediction }
    }

    fn draw(&self, status: &Status) {
        let phase = match status.phase {
            Phase::Setup => "setup".to_owned(),
            Phase::Precopy => format!("round {}", status.round),
            Phase::Switchover => "switching".to_owned(),
            Phase::Completed => "done".to_owned(),
            Phase::Failed => "failed".to_owned(),
            Phase::Unconfirmed => "undecided".to_owned(),
        };
        self.round.set_prefix(phase);
        self.round.set_length(status.round_pages.max(1));
        self.round.set_position(status.round_pages_done.min(status.round_pages));
        self.round.set_message(format!(
            "{} pages left  wire {}/s",
            HumanCount(status.round_pages.saturating_sub(status.round_pages_done)),
            binary_bytes(status.wire_bytes_per_s),
        ));
        let vcpus = status.dirty_pages_per_s.iter().enumerate();
        let vcpus: Vec<String> = vcpus
            .map(|(vcpu, pages)| format!("vCPU {vcpu} {}/s", binary_bytes(pages * PAGE_SIZE as f64)))
            .collect();
        self.vcpus.set_message(format!("dirties   {}", vcpus.join("  ")));
        if let Some(prediction) = &status.prediction {
            self.prediction.set_message(format!("expected  {}", expectation(prediction)));
        }
    }
}
