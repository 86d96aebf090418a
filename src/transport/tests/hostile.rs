//! Peers that break the rules: each is answered with a typed error, nothing they send lands, and memory, threads
//! and waits stay bounded.

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::wire::data::{
    Acknowledgement, DataHello, DataWelcome, Frame, FrameHeader, FrameKind, FrameRun, Role, RunKind, Verdict,
    payload_checksum, write_frame,
};

/// A source of the test's own making, greeted and welcomed.
struct Source {
    stream: TcpStream,
    sequence: u64,
}

impl Source {
    fn connect(address: SocketAddr, connection: u32) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(DataHello::new(TOKEN.0, 0, connection, Role::Bulk).as_bytes()).unwrap();
        let mut answer = [0; DataWelcome::BYTES];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(DataWelcome::read(&answer), Ok((Verdict::Welcome, 0)));
        Self { stream, sequence: 0 }
    }

    fn frame(&mut self, runs: &[FrameRun]) -> Frame {
        self.sequence += 1;
        let pages = runs.iter().filter(|run| run.kind == RunKind::Raw).map(|run| run.pages).sum::<u32>();
        let run_count = u32::try_from(runs.len()).unwrap();
        let payload_bytes = pages * 4096;
        Frame { run_count, payload_bytes, ..Frame::new(FrameKind::Pages, self.sequence, 5, 0) }
    }

    fn send(&mut self, frame: &Frame, runs: &[FrameRun], payload: usize) {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, frame, runs);
        bytes.resize(bytes.len() + payload, 0xee);
        // The receiver may hang up in the middle of it.
        let _ = self.stream.write_all(&bytes);
    }

    /// Whether the receiver acknowledges the frame (or hangs up).
    fn is_acknowledged(&mut self) -> bool {
        let mut bytes = [0; Acknowledgement::BYTES];
        self.stream.read_exact(&mut bytes).is_ok() && Acknowledgement::read(&bytes) == Ok(self.sequence)
    }
}

fn run(first: u64, pages: u32, kind: RunKind) -> FrameRun {
    FrameRun { first: PageIndex(first), pages, kind }
}

fn data(first: u64, pages: u32) -> FrameRun {
    run(first, pages, RunKind::Raw)
}

fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn frames_that_cannot_be_are_refused_before_a_byte_lands_and_an_honest_source_goes_on() {
    type Attack = fn(&mut Source);
    let attacks: &[(&str, Attack)] = &[
        ("out of RAM: the page at 0x64000", |s| {
            let runs = [data(3, 2), data(100, 1)];
            let frame = s.frame(&runs);
            s.send(&frame, &runs, 3 * 4096);
        }),
        ("is not guest RAM", |s| {
            let runs = [data(98, 4)];
            let frame = s.frame(&runs);
            s.send(&frame, &runs, 4 * 4096);
        }),
        ("is not guest RAM", |s| {
            let runs = [run(90, u32::MAX, RunKind::Zero)];
            let frame = s.frame(&runs);
            s.send(&frame, &runs, 0);
        }),
        ("overlaps", |s| {
            let runs = [data(3, 2), data(4, 1)];
            let frame = s.frame(&runs);
            s.send(&frame, &runs, 3 * 4096);
        }),
        ("frame 9 arrived, 1 was due", |s| {
            let frame = Frame { sequence: 9, ..s.frame(&[data(3, 1)]) };
            s.send(&frame, &[data(3, 1)], 4096);
        }),
        ("add up to", |s| {
            let frame = Frame { payload_bytes: 4096, ..s.frame(&[data(3, 2)]) };
            s.send(&frame, &[data(3, 2)], 4096);
        }),
        ("the limit is", |s| {
            let frame = Frame { run_count: u32::MAX, ..s.frame(&[]) };
            s.send(&frame, &[], 0);
        }),
        ("retired", |s| {
            let frame = Frame { kind: FrameKind::Retire, argument: 1000, ..s.frame(&[]) };
            s.send(&frame, &[], 0);
        }),
        ("checksum of a chunk of device state", |s| {
            let frame = Frame { kind: FrameKind::State, payload_bytes: 100, ..s.frame(&[]) };
            s.send(&frame, &[], 100);
        }),
        ("may be on its way", |s| {
            let payload_checksum = payload_checksum(&[0xee; 100]);
            let state = Frame { kind: FrameKind::State, argument: 1 << 40, ..s.frame(&[]) };
            s.send(&Frame { payload_bytes: 100, payload_checksum, ..state }, &[], 100);
        }),
        ("Ringferry", |s| {
            let _ = s.stream.write_all(&[0x47; FrameHeader::BYTES]);
        }),
    ];
    for (number, (reason, attack)) in attacks.iter().enumerate() {
        let source = Ram::new(&[(0, 100), (200, 50)]);
        let (target, receiver, address) = destination(&source);
        let mut hostile = Source::connect(address, 1000);
        attack(&mut hostile);
        assert!(!hostile.is_acknowledged(), "attack {number}");
        wait_for("a failure on record", || !receiver.failures().is_empty());
        let failures = receiver.failures();
        let reason = reason.strip_prefix("out of RAM: ").unwrap_or(reason);
        assert!(failures.len() == 1 && failures[0].contains(reason), "attack {number}: {failures:?}");
        assert_eq!(target.resident_bytes(), 0, "attack {number}");
        source.fill(1);
        let mut honest = sender(&[address], &source, options());
        honest.send_round(1, source.pages()).unwrap();
        drop((honest, receiver));
        assert_eq!(source.digest(), target.digest(), "attack {number}");
    }
}

#[test]
fn a_frame_with_any_byte_of_header_or_run_list_changed_never_lands() {
    let (target, receiver, address) = destination(&Ram::new(&[(0, 100)]));
    let runs = [data(3, 2), run(7, 5, RunKind::Zero), data(20, 1)];
    let length = FrameHeader::BYTES + runs.len() * 16;
    let mut expected = 0;
    for at in 0..length {
        let mut source = Source::connect(address, u32::try_from(at + 1).unwrap());
        let frame = source.frame(&runs);
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &frame, &runs);
        bytes[at] ^= 1 << (at % 8);
        bytes.resize(length + 3 * 4096, 0xee);
        // A frame with more runs than were sent takes the payload for them; then this is all there is.
        let _ = source.stream.write_all(&bytes).and_then(|()| source.stream.shutdown(Shutdown::Write));
        assert!(!source.is_acknowledged(), "byte {at}");
        expected += 1;
    }
    wait_for("a failure for each", || receiver.failures().len() == expected);
    assert_eq!((receiver.received().pages, target.resident_bytes()), (0, 0));
}

/// A piece of what a hostile source sends.
#[derive(Clone, Debug)]
enum Piece {
    Noise(Vec<u8>),
    /// A frame whose checksum is right, whatever its fields say, and so much payload.
    Frame {
        kind: FrameKind,
        sequence: u64,
        argument: u64,
        stated: u32,
        runs: Vec<FrameRun>,
        payload: usize,
    },
}

fn pieces() -> impl Strategy<Value = Piece> {
    let run = (0..120_u64, prop_oneof![0..4_u32, any::<u32>()], any::<bool>())
        .prop_map(|(first, pages, zero)| run(first, pages, if zero { RunKind::Zero } else { RunKind::Raw }));
    let kind = prop_oneof![
        4 => Just(FrameKind::Pages),
        1 => Just(FrameKind::Retire),
        1 => Just(FrameKind::State),
        1 => Just(FrameKind::Unknown(9)),
    ];
    let frame = (
        kind,
        0..4_u64,
        any::<u64>(),
        prop_oneof![0..5_u32, any::<u32>()],
        prop::collection::vec(run, 0..4),
        0..20_000_usize,
    );
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..200).prop_map(Piece::Noise),
        4 => frame.prop_map(|(kind, sequence, argument, stated, runs, payload)| {
            let stated = stated.wrapping_mul(4096);
            Piece::Frame { kind, sequence, argument, stated, runs, payload }
        }),
    ]
}

fn bytes_of(pieces: &[Piece]) -> Vec<u8> {
    let mut all = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Noise(noise) => all.extend_from_slice(noise),
            Piece::Frame { kind, sequence, argument, stated, runs, payload } => {
                let mut bytes = Vec::new();
                let frame = Frame {
                    run_count: u32::try_from(runs.len()).unwrap(),
                    payload_bytes: *stated,
                    ..Frame::new(*kind, *sequence, 1, *argument)
                };
                write_frame(&mut bytes, &frame, runs);
                all.append(&mut bytes);
                all.resize(all.len() + payload, 0xee);
            }
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_welcomed_source_sends_it_writes_guest_ram_or_nothing_and_an_honest_one_goes_on(
        streams in prop::collection::vec(prop::collection::vec(pieces(), 0..6), 1..3),
    ) {
        let source = Ram::new(&[(0, 100)]);
        let (target, receiver, address) = destination(&source);
        for (number, pieces) in (1000..).zip(&streams) {
            let mut hostile = Source::connect(address, number);
            // The receiver may have hung up by then.
            let _ = hostile.stream.write_all(&bytes_of(pieces)).and_then(|()| hostile.stream.shutdown(Shutdown::Write));
            let answered = io::copy(&mut hostile.stream, &mut io::sink()).unwrap_or(0);
            prop_assert!(answered <= (pieces.len() * Acknowledgement::BYTES) as u64);
        }
        prop_assert!(receiver.failures().len() <= streams.len());
        prop_assert!(receiver.received().pages <= 100 * streams.len() as u64 * 6);
        source.fill(1);
        let mut honest = sender(&[address], &source, options());
        honest.send_round(2, source.pages()).unwrap();
        drop((honest, receiver));
        prop_assert_eq!(source.digest(), target.digest());
    }

    #[test]
    fn whatever_a_stranger_says_at_the_door_it_is_not_let_in(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let (target, receiver, listener) = destination_with_door(&Ram::new(&[(0, 100)]));
        let mut stranger = TcpStream::connect(listener.addresses()[0]).unwrap();
        let _ = stranger.write_all(&bytes).and_then(|()| stranger.shutdown(Shutdown::Write));
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer);
        let welcomed = |answer| matches!(DataWelcome::read(answer), Ok((Verdict::Welcome, _)));
        prop_assert!(!answer.first_chunk().is_some_and(welcomed));
        wait_for("a failure on record", || listener.failures().len() == 1);
        prop_assert_eq!((receiver.received().connections, target.resident_bytes()), (0, 0));
    }

    #[test]
    fn whatever_a_destination_answers_the_round_ends_in_an_error_and_guest_ram_is_as_it_was(
        noise in prop::collection::vec(any::<u8>(), 0..100),
        sequences in prop::collection::vec(any::<u64>(), 0..4),
    ) {
        let ram = Ram::new(&[(0, 50)]);
        ram.fill(1);
        let before = ram.digest();
        let address = fake_destination(welcome(), move |stream| {
            // No frame is acknowledged as number 0, and none beyond the last.
            for sequence in &sequences {
                let _ = stream.write_all(Acknowledgement::new(sequence | 1 << 40).as_bytes());
            }
            let _ = stream.write_all(&noise).and_then(|()| stream.shutdown(Shutdown::Write));
            let _ = io::copy(stream, &mut io::sink());
        });
        let mut sender = sender(&[address], &ram, SendOptions { reconnect: false, ..options() });
        let error = sender.send_round(1, ram.pages()).unwrap_err();
        let no_channel_left = matches!(error, TransportError::NoChannelLeft { .. });
        prop_assert!(no_channel_left, "{}", error);
        prop_assert_eq!(before, ram.digest());
    }
}

#[test]
fn an_older_round_after_a_newer_one_is_refused() {
    let (_target, receiver, address) = destination(&Ram::new(&[(0, 100)]));
    let mut source = Source::connect(address, 1);
    let frame = source.frame(&[data(1, 1)]);
    source.send(&frame, &[data(1, 1)], 4096);
    assert!(source.is_acknowledged());
    let frame = Frame { round: 4, ..source.frame(&[data(1, 1)]) };
    source.send(&frame, &[data(1, 1)], 4096);
    assert!(!source.is_acknowledged());
    wait_for("a failure on record", || !receiver.failures().is_empty());
    assert!(receiver.failures()[0].contains("round 4 after one of round 5"), "{:?}", receiver.failures());
}

#[test]
fn a_source_that_breaks_off_inside_a_frame_is_on_record_as_broken() {
    let (_target, receiver, address) = destination(&Ram::new(&[(0, 100)]));
    for (connection, payload) in [(1, 0), (2, 100), (3, 4096 + 5)] {
        let mut source = Source::connect(address, connection);
        let frame = source.frame(&[data(1, 2)]);
        source.send(&frame, &[data(1, 2)], payload);
        drop(source);
    }
    let mut source = Source::connect(address, 4);
    source.stream.write_all(&[1, 2, 3]).unwrap();
    drop(source);
    wait_for("four failures on record", || receiver.failures().len() == 4);
    wait_for("all connections gone", || receiver.is_abandoned());
    assert_eq!(receiver.received().pages, 0);
}

#[test]
fn a_connection_number_serves_once_and_a_retired_one_never() {
    let (_target, _receiver, address) = destination(&Ram::new(&[(0, 100)]));
    let mut first = Source::connect(address, 1);
    let frame = Frame { kind: FrameKind::Retire, argument: 2, ..first.frame(&[]) };
    first.send(&frame, &[], 0);
    assert!(first.is_acknowledged());
    for connection in [1, 2] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(DataHello::new(TOKEN.0, 0, connection, Role::Bulk).as_bytes()).unwrap();
        let mut answer = [0; DataWelcome::BYTES];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(DataWelcome::read(&answer), Ok((Verdict::NotExpected, 0)));
    }
}

#[test]
fn any_number_of_strangers_leaves_room_for_the_source_and_holds_no_threads() {
    let source = Ram::new(&[(0, 100)]);
    source.fill(1);
    let (target, receiver, listener) = destination_with_door(&source);
    let address = listener.addresses()[0];
    let mut garbage = TcpStream::connect(address).unwrap();
    garbage.write_all(&[7; 4096]).unwrap();
    wait_for("the garbage to be noticed", || !listener.failures().is_empty());
    assert!(listener.failures()[0].contains("not Ringferry"), "{:?}", listener.failures());
    // More than are heard at a time, and half of them say something that never ends.
    let crowd: Vec<_> = (0..400)
        .map(|n| {
            let mut stranger = TcpStream::connect(address).unwrap();
            if n % 2 == 0 {
                let hello = DataHello::new(TOKEN.0, 0, 9, Role::Bulk);
                let _ = stranger.write_all(&hello.as_bytes()[..n % DataHello::BYTES]);
            }
            stranger
        })
        .collect();
    let mut honest = sender(&[address; 4], &source, options());
    honest.send_round(1, source.pages()).unwrap();
    assert_eq!(receiver.received().connections, 4);
    wait_for("giving way", || listener.failures().iter().any(|failure| failure.contains("gave way")));
    wait_for("patience to end", || listener.failures().iter().any(|failure| failure.contains("no greeting")));
    drop((honest, receiver, crowd));
    assert_eq!(source.digest(), target.digest());
}

#[test]
fn what_a_greeting_demands_in_vain_is_said_with_its_number() {
    let (_target, _receiver, address) = destination(&Ram::new(&[(0, 1)]));
    for (at, value, answer) in [
        (51, 0x80, (Verdict::UnknownRequirement, 0x8000_0000)),
        (52, 7, (Verdict::UnknownRole, 7)),
        (4, 1, (Verdict::WrongVersion, 1)),
    ] {
        let mut hello = DataHello::new(TOKEN.0, 0, 1, Role::Urgent).as_bytes().to_vec();
        hello[at] = value;
        let end = hello.len() - 4;
        let checksum = payload_checksum(&hello[..end]).to_le_bytes();
        hello[end..].copy_from_slice(&checksum);
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&hello).unwrap();
        let mut welcome = [0; DataWelcome::BYTES];
        stream.read_exact(&mut welcome).unwrap();
        assert_eq!(DataWelcome::read(&welcome), Ok(answer));
    }
}

/// A destination of the test's own making: answers greetings with `welcome`, then does `serve`.
fn fake_destination(welcome: Vec<u8>, serve: impl Fn(&mut TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind(loopback()).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut hello = [0; DataHello::BYTES];
            if stream.read_exact(&mut hello).is_ok() && stream.write_all(&welcome).is_ok() {
                serve(&mut stream);
            }
        }
    });
    address
}

fn welcome() -> Vec<u8> {
    DataWelcome::new((Verdict::Welcome, 0)).as_bytes().to_vec()
}

#[test]
fn destinations_that_answer_nonsense_are_refused_at_the_greeting() {
    let ram = Ram::new(&[(0, 10)]);
    let connect = |to| {
        let options = SendOptions { connect_timeout: Duration::from_millis(300), ..options() };
        super::connect(&[ChannelSpec::to(to)], TOKEN, &ram, options).unwrap_err()
    };
    let garbage = connect(fake_destination(vec![9; DataWelcome::BYTES], |_| ()));
    assert!(matches!(garbage, TransportError::Malformed { .. }), "{garbage}");
    let refused =
        connect(fake_destination(DataWelcome::new((Verdict::WrongVersion, 9)).as_bytes().to_vec(), |_| ()));
    assert!(matches!(refused, TransportError::Refused { verdict: Verdict::WrongVersion, .. }), "{refused}");
    let silent = connect(fake_destination(Vec::new(), |_| thread::sleep(PATIENCE)));
    assert!(matches!(silent, TransportError::Connect { .. }), "{silent}");
}

#[test]
fn acknowledgements_that_cannot_be_end_the_channel_and_the_round_fails() {
    let ram = Ram::new(&[(0, 1000)]);
    ram.fill(1);
    for (answer, reason) in [
        (vec![5; Acknowledgement::BYTES], "acknowledgement begins with"),
        (Acknowledgement::new(u64::MAX).as_bytes().to_vec(), "was acknowledged"),
    ] {
        let address = fake_destination(welcome(), move |stream| {
            let _ = stream.write_all(&answer);
            thread::sleep(Duration::from_secs(1));
        });
        let options = SendOptions { reconnect: false, ..options() };
        let mut sender = sender(&[address], &ram, options);
        let error = sender.send_round(1, ram.pages()).unwrap_err();
        assert!(matches!(error, TransportError::NoChannelLeft { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn a_destination_that_reads_everything_and_acknowledges_nothing_is_given_up() {
    let ram = Ram::new(&[(0, 1000)]);
    ram.fill(1);
    let address = fake_destination(welcome(), |stream| {
        let _ = io::copy(stream, &mut io::sink());
    });
    let mut sender = sender(&[address], &ram, SendOptions { reconnect: false, ..options() });
    let error = sender.send_round(1, ram.pages()).unwrap_err();
    assert!(error.to_string().contains("nothing for"), "{error}");
}
