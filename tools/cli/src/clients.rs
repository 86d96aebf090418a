//! Those who are connected to the monitor socket of `ringferry run`. Each has a thread that reads and one that writes,
//! so that a client which is silent, slow or gone holds up neither the VM, nor its migration, nor another client.
//!
//! A client asks for one thing, and within a moment. A change of terms is answered at once; a migration becomes an
//! [`Order`], which `run` fetches, and from then on its client may cancel it. If nobody knows how the migration has ended,
//! a client may decide it: that is a [`Resolution`].

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use ringferry::progress::{Progress, Update};

use crate::background::{Background, Worth};
use crate::migrate::{Decision, MigrateArgs};
use crate::monitor::{Answer, Line, Monitor, Request, line_of};
use crate::terms::TermsArgs;

/// A client asks within this time or not at all.
const PATIENCE: Duration = Duration::from_secs(2);
/// Clients at a time; a further one is turned away.
const CLIENTS_MAX: usize = 16;
/// How often the socket is looked at.
const POLL: Duration = Duration::from_millis(10);
/// How soon a socket that failed is tried again.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// What a client hears that asks for anything but a decision.
const UNDECIDED: &str = "the last migration was not confirmed, and the VM stands still: find out whether it runs at \
                         the destination, then `ringferry resolve --keep` or `ringferry resolve --drop`";
/// How long the client of a migration that has completed may take to read the report.
const REPORT_TAKEN_WITHIN: Duration = Duration::from_secs(10);

/// The threads that attend to clients.
#[derive(Debug)]
pub struct Clients {
    shared: Arc<Shared>,
    orders: Receiver<Order>,
    resolutions: Receiver<Resolution>,
    listening: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    connected: AtomicUsize,
    ended: AtomicBool,
}

/// What clients may ask for.
#[derive(Debug, Default)]
enum State {
    /// A migration.
    #[default]
    Idle,
    /// A change of the one that was ordered and has not ended.
    UnderWay(Progress),
    /// A decision, because nobody knows how it has ended.
    Undecided,
    /// Nothing, until the decision has been carried out.
    Resolving,
}

/// To `run`; one of each kind at a time.
#[derive(Clone, Debug)]
struct ToRun {
    orders: SyncSender<Order>,
    resolutions: SyncSender<Resolution>,
}

/// A migration that a client asks for. Until it is [ended](Self::end), a second one is refused.
#[derive(Debug)]
pub struct Order {
    /// `HOST:PORT` of the destination.
    pub to: String,
    /// How.
    pub args: MigrateArgs,
    /// What watches and steers it.
    pub progress: Progress,
    client: Background,
    shared: Arc<Shared>,
}

/// What a client decides on a VM of which nobody knows where it runs.
#[derive(Debug)]
pub struct Resolution {
    /// Where it is.
    pub decision: Decision,
    client: Background,
    shared: Arc<Shared>,
}

impl Clients {
    /// Attends to the clients of `monitor` until this value is dropped.
    ///
    /// # Errors
    ///
    /// The kernel gives this process no further thread.
    pub fn of(monitor: Monitor) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (orders_to_run, orders) = mpsc::sync_channel(1);
        let (resolutions_to_run, resolutions) = mpsc::sync_channel(1);
        let to_run = ToRun { orders: orders_to_run, resolutions: resolutions_to_run };
        let of_thread = shared.clone();
        let listening = thread::Builder::new()
            .name("monitor".to_owned())
            .spawn(move || listen(&monitor, &of_thread, &to_run))?;
        Ok(Self { shared, orders, resolutions, listening: Some(listening) })
    }

    /// Waits for an order, for `time`.
    pub fn order(&self, time: Duration) -> Option<Order> {
        self.orders.recv_timeout(time).ok()
    }

    /// Waits for a decision on a migration that is [undecided](Order::undecided), as long as it takes.
    pub fn resolution(&self) -> Resolution {
        loop {
            match self.resolutions.recv() {
                Ok(resolution) => return resolution,
                // Nobody attends to clients any more: a second signal is the way out.
                Err(_) => thread::sleep(AFTER_FAILURE),
            }
        }
    }
}

impl Clients {
    /// Nobody knows how a migration has ended that no client ordered; somebody may decide it now.
    pub fn undecided(&self) {
        *lock(&self.shared.state) = State::Undecided;
    }
}

impl Drop for Clients {
    /// The socket file is gone afterwards.
    fn drop(&mut self) {
        // Relaxed: a flag without data, polled.
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(listening) = self.listening.take() {
            // It has nothing to say.
            let _ = listening.join();
        }
    }
}

impl Order {
    /// Tells the client how it goes; a client that is behind misses some of it.
    pub fn update(&self, update: &Update) {
        push(&self.client, Worth::Progress, &Answer::Update(update.clone()));
    }

    /// Tells the client that nobody knows how the migration has ended, and what can be done; somebody may decide it now.
    pub fn undecided(&self, text: &str) {
        *lock(&self.shared.state) = State::Undecided;
        push(&self.client, Worth::Report, &Answer::Unconfirmed(text.to_owned()));
    }

    /// Tells the client how the migration has ended; the next one may be ordered. Returns what waits until the client
    /// has heard it.
    pub fn end(self, answer: &Answer) -> LastAnswer {
        *lock(&self.shared.state) = State::Idle;
        push(&self.client, Worth::Report, answer);
        LastAnswer(self.client)
    }
}

impl Resolution {
    /// Tells the client that it is done. The next migration may be ordered.
    pub fn done(self) -> LastAnswer {
        *lock(&self.shared.state) = State::Idle;
        push(&self.client, Worth::Report, &Answer::Resolved(self.decision));
        LastAnswer(self.client)
    }

    /// Tells the client why it cannot be done. Somebody has to decide anew.
    pub fn failed(self, why: &str) {
        *lock(&self.shared.state) = State::Undecided;
        push(&self.client, Worth::Report, &Answer::Failed(why.to_owned()));
    }
}

/// An answer on its way. Dropped, it is delivered all the same, as long as the process lives.
#[derive(Debug)]
pub struct LastAnswer(Background);

impl LastAnswer {
    /// Waits until the client has taken it, for a bounded time.
    pub fn delivered(self) {
        if let Some(loss) = self.0.finish(REPORT_TAKEN_WITHIN) {
            tracing::warn!("the client of the monitor socket missed something of the migration: {loss}");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind it is assigned as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn push(client: &Background, worth: Worth, answer: &Answer) {
    match line_of(answer) {
        Ok(line) => client.push(worth, line),
        Err(error) => tracing::warn!(%error, "an answer of the monitor socket cannot be written as JSON"),
    }
}

fn listen(monitor: &Monitor, shared: &Arc<Shared>, to_run: &ToRun) {
    while !shared.ended.load(Ordering::Relaxed) {
        match monitor.accept() {
            Ok(Some(stream)) => {
                if let Err(error) = attend(stream, shared, to_run) {
                    tracing::warn!("a client of the monitor socket was turned away: {error:#}");
                }
            }
            Ok(None) => thread::sleep(POLL),
            Err(error) => {
                tracing::warn!(%error, "the monitor socket failed; it is tried again");
                thread::sleep(AFTER_FAILURE);
            }
        }
    }
}

/// Gives a client its thread.
fn attend(stream: UnixStream, shared: &Arc<Shared>, to_run: &ToRun) -> Result<()> {
    let Some(place) = Place::take(shared) else {
        return Err(anyhow!("{CLIENTS_MAX} others are connected"));
    };
    let (shared, to_run) = (shared.clone(), to_run.clone());
    thread::Builder::new().name("monitor client".to_owned()).spawn(move || {
        let _place = place;
        if let Err(error) = serve(stream, &shared, &to_run) {
            tracing::warn!("a client of the monitor socket was turned away: {error:#}");
        }
    })?;
    Ok(())
}

/// One of the clients that there may be at a time.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        // Relaxed: a number that guards no data. Only the listening thread adds to it.
        if shared.connected.load(Ordering::Relaxed) >= CLIENTS_MAX {
            return None;
        }
        shared.connected.fetch_add(1, Ordering::Relaxed);
        Some(Self(shared.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(stream: UnixStream, shared: &Arc<Shared>, to_run: &ToRun) -> Result<()> {
    let mut line = Line::new(stream)?;
    let Some(request) = line.request(Some(PATIENCE))? else { return Ok(()) };
    let client = Background::new("monitor answers", Outlet(line.writer()?))?;
    match request {
        // There is nothing that this client has begun.
        Request::Cancel => {}
        Request::Adjust(terms) => push(&client, Worth::Report, &shared.adjust(&terms)),
        Request::Migrate { to, args } => match shared.begin(&args) {
            Ok(progress) => {
                let order = Order { to, args, progress: progress.clone(), client, shared: shared.clone() };
                // If `run` has ended meanwhile, so has the connection.
                if to_run.orders.send(order).is_ok() {
                    cancel_on_request(&mut line, &progress);
                }
            }
            Err(why) => push(&client, Worth::Report, &Answer::Failed(format!("{why:#}"))),
        },
        Request::Resolve(decision) => match shared.begin_to_resolve() {
            // If `run` has ended meanwhile, so has the connection.
            Ok(()) => drop(to_run.resolutions.send(Resolution { decision, client, shared: shared.clone() })),
            Err(why) => push(&client, Worth::Report, &Answer::Failed(why.to_string())),
        },
    }
    Ok(())
}

/// Waits for what the client of a migration says further, until one of the two closes the connection.
fn cancel_on_request(line: &mut Line, progress: &Progress) {
    while let Ok(Some(request)) = line.request(None) {
        if matches!(request, Request::Cancel) {
            progress.parameters().cancel();
        }
    }
}

impl Shared {
    fn begin(&self, args: &MigrateArgs) -> Result<Progress> {
        let progress = args.progress()?;
        let mut state = lock(&self.state);
        match *state {
            State::Idle => {}
            State::UnderWay(_) => {
                bail!("a migration is under way: wait for its end, or adjust it")
            }
            State::Undecided | State::Resolving => bail!(UNDECIDED),
        }
        *state = State::UnderWay(progress.clone());
        Ok(progress)
    }

    fn begin_to_resolve(&self) -> Result<()> {
        let mut state = lock(&self.state);
        match *state {
            State::Undecided => {}
            State::Idle | State::UnderWay(_) => {
                bail!("there is nothing to decide: no migration has ended unconfirmed")
            }
            State::Resolving => bail!("somebody else has just decided it"),
        }
        *state = State::Resolving;
        Ok(())
    }

    fn adjust(&self, terms: &TermsArgs) -> Answer {
        match &*lock(&self.state) {
            State::Idle => {
                Answer::Failed("no migration is under way: start one with `ringferry send`".to_owned())
            }
            State::Undecided | State::Resolving => Answer::Failed(UNDECIDED.to_owned()),
            State::UnderWay(progress) => match terms.change(progress.parameters()) {
                Ok(()) => Answer::Adjusted,
                Err(wrong) => Answer::Failed(wrong.to_string()),
            },
        }
    }
}

/// The writing end of a connection. It ends the connection when all is written, and when a write fails: what comes
/// after a line that was cut would be misread.
struct Outlet(UnixStream);

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes);
        if written.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::Interrupted) {
            self.close();
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Outlet {
    fn close(&self) {
        // Closed by the other side already: as good.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use ringferry::progress::{RoundReport, Status};
    use ringferry::source::SourceReport;

    use super::*;
    use crate::report::MigrationReport;

    /// An order, and its client's end of the connection.
    fn order() -> (Order, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let shared = Arc::new(Shared::default());
        let args = MigrateArgs::default();
        let progress = shared.begin(&args).unwrap();
        let client = Background::new("client", Outlet(ours)).unwrap();
        (Order { to: String::new(), args, progress, client, shared }, theirs)
    }

    #[test]
    fn a_report_of_ten_thousand_rounds_arrives() {
        let (order, theirs) = order();
        let mut round = RoundReport::default();
        round.vcpu_pages_dirtied = vec![u64::MAX; 16];
        let source = SourceReport { rounds: vec![round; 10_000], ..SourceReport::default() };
        let last = order.end(&Answer::Report(Box::new(MigrationReport::new("kvm", source, Vec::new()))));
        let Some(Answer::Report(arrived)) = Line::new(theirs).unwrap().answer(None).unwrap() else {
            panic!("no report")
        };
        assert_eq!(arrived.source.rounds.len(), 10_000);
        last.delivered();
    }

    #[test]
    fn a_client_that_reads_late_misses_updates_is_not_waited_for_and_hears_the_end() {
        let (order, theirs) = order();
        // Far more than a socket and the queue hold.
        for sequence in 0..20_000 {
            order.update(&Update::Status { sequence, status: Status::default() });
        }
        let last = order.end(&Answer::Failed("the end".to_owned()));
        let reading = thread::spawn(move || BufReader::new(theirs).lines().map_while(Result::ok).collect());
        last.delivered();
        let lines: Vec<String> = reading.join().unwrap();
        assert!(lines.len() < 20_000, "{}", lines.len());
        assert_eq!(lines.last().map(String::as_str), Some(r#"{"failed":"the end"}"#));
    }

    #[test]
    fn a_second_migration_is_refused_until_the_first_has_ended() {
        let shared = Shared::default();
        let args = MigrateArgs::default();
        assert!(matches!(shared.adjust(&TermsArgs::default()), Answer::Failed(_)));
        shared.begin(&args).unwrap();
        assert!(shared.begin(&args).unwrap_err().to_string().contains("under way"));
        assert!(matches!(shared.adjust(&TermsArgs::default()), Answer::Adjusted));
    }
    #[test]
    fn while_nobody_has_decided_a_decision_is_all_that_is_taken_and_only_one() {
        let (order, _theirs) = order();
        let shared = order.shared.clone();
        assert!(shared.begin_to_resolve().unwrap_err().to_string().contains("nothing to decide"));
        order.undecided("nobody knows");
        for _ in 0..2 {
            assert!(shared.begin(&MigrateArgs::default()).unwrap_err().to_string().contains("not confirmed"));
            let Answer::Failed(why) = shared.adjust(&TermsArgs::default()) else { panic!("adjusted") };
            assert!(why.contains("ringferry resolve"), "{why}");
            // The first time it is taken, and nothing else is until it has been carried out.
            let _ = shared.begin_to_resolve();
        }
        assert!(shared.begin_to_resolve().unwrap_err().to_string().contains("somebody else"));
        drop(order.end(&Answer::Resolved(Decision::Keep)));
        assert!(shared.begin(&MigrateArgs::default()).is_ok());
    }
}
