use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::error::tail_of;
use super::frame::head_checksum;
use super::*;
use crate::layout::PageIndex;
use crate::wire::{
    FRAME_DATA_PAGES_MAX, FRAME_EXTENSION_BYTES_MAX, FRAME_PAYLOAD_BYTES_MAX, FRAME_RUNS_MAX,
    STATE_CHUNK_BYTES_MAX,
};

/// Run lists as a source makes them: ascending, a page at least, data within the limit.
fn run_lists() -> impl Strategy<Value = Vec<FrameRun>> {
    prop::collection::vec((0..1000_u64, 1..40_u32, any::<bool>()), 1..25).prop_map(|parts| {
        let mut next = 0;
        let run = |(gap, pages, zero): (u64, u32, bool)| {
            let first = PageIndex(next + gap);
            next = first.0 + u64::from(pages);
            FrameRun { first, pages, kind: if zero { RunKind::Zero } else { RunKind::Raw } }
        };
        parts.into_iter().map(run).collect()
    })
}

fn frame_of(runs: &[FrameRun]) -> Frame {
    let data = runs.iter().filter(|run| run.kind == RunKind::Raw).map(|run| run.pages).sum::<u32>();
    Frame {
        run_count: u32::try_from(runs.len()).unwrap(),
        payload_bytes: data * 4096,
        ..Frame::new(FrameKind::Pages, 7, 3, 0)
    }
}

fn written(frame: &Frame, runs: &[FrameRun]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, frame, runs);
    bytes
}

/// What a receiver does with the bytes of header and run list.
fn read(bytes: &[u8]) -> Result<(Frame, Vec<FrameRun>), DataError> {
    let header = bytes.first_chunk().expect("shorter than a header");
    let frame = FrameHeader::read(header)?;
    let mut runs = Vec::new();
    read_runs(&frame, bytes, &mut runs)?;
    Ok((frame, runs))
}

/// The same header and runs with a valid checksum, whatever nonsense they hold.
fn signed(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = head_checksum(&bytes);
    bytes[FrameHeader::BYTES - 4..FrameHeader::BYTES].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

proptest! {
    #[test]
    fn a_frame_reads_as_it_was_written(runs in run_lists()) {
        let frame = frame_of(&runs);
        prop_assert_eq!(read(&written(&frame, &runs)), Ok((frame, runs)));
    }

    #[test]
    fn one_flipped_bit_anywhere_is_noticed(runs in run_lists(), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let mut bytes = written(&frame_of(&runs), &runs);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn a_truncated_or_padded_run_list_is_refused(runs in run_lists(), cut in 1..16_usize) {
        let bytes = written(&frame_of(&runs), &runs);
        prop_assert!(read(&bytes[..bytes.len() - cut]).is_err());
        let mut longer = bytes;
        longer.resize(longer.len() + cut, 0);
        prop_assert!(read(&longer).is_err());
    }

    #[test]
    fn random_bytes_are_refused_and_never_panic(bytes in prop::collection::vec(any::<u8>(), FrameHeader::BYTES..400)) {
        prop_assert!(read(&bytes).is_err());
        prop_assert!(DataHello::read(&bytes).is_err());
        prop_assert!(DataWelcome::read(bytes.first_chunk().unwrap()).is_err());
        prop_assert!(Acknowledgement::read(bytes.first_chunk().unwrap()).is_err());
    }

    #[test]
    fn whatever_a_valid_checksum_covers_is_bounded_and_in_order(
        words in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u32>(), 0..3_u64), 1..50),
        small in any::<bool>(),
        payload in any::<u32>(),
    ) {
        let mut bytes = written(&Frame { run_count: 0, payload_bytes: payload, ..frame_of(&[]) }, &[]);
        bytes[32..36].copy_from_slice(&u32::try_from(words.len()).unwrap().to_le_bytes());
        for (first, pages, encoded_bytes, kind) in words {
            let (first, pages) = if small { (first % 100, pages % 9) } else { (first, pages) };
            let encoded_bytes = if small { pages * 4096 * u32::from(kind == 0) } else { encoded_bytes };
            let first_kind_flags = if small { first | kind << 48 } else { first };
            let run = WireRun {
                first_kind_flags: first_kind_flags.into(),
                pages: pages.into(),
                encoded_bytes: encoded_bytes.into(),
            };
            bytes.extend_from_slice(run.as_bytes());
        }
        if let Ok((frame, runs)) = read(&signed(bytes)) {
            let data: u64 = runs.iter().filter(|r| r.kind == RunKind::Raw).map(|r| u64::from(r.pages)).sum();
            prop_assert_eq!(data * 4096, u64::from(frame.payload_bytes));
            prop_assert!(data <= u64::from(FRAME_DATA_PAGES_MAX));
            prop_assert!(runs.iter().all(|run| run.pages > 0));
            prop_assert!(runs.windows(2).all(|pair| pair[0].run().end() <= pair[1].first));
        }
    }
}

fn data(first: u64, pages: u32) -> FrameRun {
    FrameRun { first: PageIndex(first), pages, kind: RunKind::Raw }
}

#[test]
fn each_impossible_run_list_has_its_own_error() {
    let refused = |runs: &[FrameRun]| read(&written(&frame_of(runs), runs)).unwrap_err();
    assert_eq!(refused(&[data(5, 0)]), DataError::Run { first: 5, pages: 0 });
    let beyond = (1 << 48) - 1;
    assert_eq!(refused(&[data(beyond, 2)]), DataError::Run { first: beyond, pages: 2 });
    assert_eq!(refused(&[data(5, 3), data(7, 1)]), DataError::RunOrder { first: 7 });
    assert_eq!(refused(&[data(5, 1), data(4, 1)]), DataError::RunOrder { first: 4 });
    assert_eq!(
        read(&written(&Frame { payload_bytes: 4096, ..frame_of(&[data(0, 2)]) }, &[data(0, 2)])).unwrap_err(),
        DataError::PayloadMismatch { stated: 4096, computed: 8192 }
    );
}

#[test]
fn lengths_beyond_their_limits_are_refused_before_anything_is_read() {
    let refused = |frame: Frame| {
        let bytes = written(&frame, &[]);
        FrameHeader::read(bytes.first_chunk().unwrap()).unwrap_err()
    };
    let ok = frame_of(&[data(0, 1)]);
    let limit = u64::from(FRAME_RUNS_MAX);
    assert_eq!(
        refused(Frame { run_count: FRAME_RUNS_MAX + 1, ..ok }),
        DataError::TooLong { what: "runs", found: limit + 1, limit }
    );
    assert!(matches!(
        refused(Frame { payload_bytes: FRAME_PAYLOAD_BYTES_MAX + 1, ..ok }),
        DataError::TooLong { what: "bytes of payload", .. }
    ));
    assert!(matches!(
        refused(Frame { extension_bytes: FRAME_EXTENSION_BYTES_MAX + 1, ..ok }),
        DataError::TooLong { what: "bytes of extension", .. }
    ));
    let shape = |frame: Frame| matches!(refused(frame), DataError::Shape { .. });
    assert!(shape(Frame { run_count: 0, ..ok }));
    assert!(shape(Frame { kind: FrameKind::Retire, ..ok }));
    assert!(shape(Frame { kind: FrameKind::Retire, run_count: 0, ..ok }));
    let state = Frame { payload_bytes: 1, ..Frame::new(FrameKind::State, 1, 1, u64::MAX - 1) };
    assert!(shape(Frame { payload_bytes: 0, ..state }));
    assert!(shape(Frame { payload_bytes: STATE_CHUNK_BYTES_MAX + 1, ..state }));
    assert!(shape(Frame { run_count: 1, ..state }));
    let argument = |frame: Frame| matches!(refused(frame), DataError::Argument { .. });
    assert!(argument(Frame { argument: u64::MAX, ..state }));
    assert!(argument(Frame::new(FrameKind::Retire, 1, 1, 1 << 32)));
}

/// The head of a frame of one raw page, with its run changed.
fn with_run(change: impl FnOnce(&mut [u8])) -> DataError {
    let mut bytes = written(&frame_of(&[data(5, 1)]), &[data(5, 1)]);
    change(&mut bytes[FrameHeader::BYTES..]);
    read(&signed(bytes)).unwrap_err()
}

#[test]
fn encodings_that_were_not_negotiated_and_lengths_that_do_not_fit_them_are_refused_by_name() {
    assert_eq!(with_run(|run| run[6] = 2), DataError::NotNegotiated { kind: "deltas" });
    assert_eq!(with_run(|run| run[6] = 3), DataError::NotNegotiated { kind: "compressed pages" });
    assert_eq!(with_run(|run| run[6] = 77), DataError::UnknownKind { what: "a run", found: 77 });
    let (kind, found, expected) = ("raw pages", 4095_u32, 4096);
    let shorter = with_run(|run| run[12..].copy_from_slice(&found.to_le_bytes()));
    assert_eq!(shorter, DataError::RunBytes { pages: 1, kind, found, expected });
    let zero = with_run(|run| run[6] = 1);
    assert_eq!(zero, DataError::RunBytes { pages: 1, kind: "zeros", found: 4096, expected: 0 });
}

#[test]
fn of_unknown_flags_those_that_must_be_understood_are_refused_by_number_and_the_others_ignored() {
    assert_eq!(with_run(|run| run[7] = 0x40), DataError::UnknownRequirement { what: "a run", bits: 0x40 });
    let runs = [data(5, 1)];
    let mut optional = written(&frame_of(&runs), &runs);
    optional[FrameHeader::BYTES + 7] = 0x0f;
    assert_eq!(read(&signed(optional)).unwrap().1, runs);
    let frame = |flags, kind| {
        let frame = Frame { flags, ..Frame::new(kind, 1, 1, 0) };
        read(&written(&frame, &[])).map(|(frame, _)| frame.kind)
    };
    let later = FrameKind::Unknown(9);
    assert_eq!(frame(0x00ff, later), Ok(later));
    assert_eq!(frame(flags::KIND_REQUIRED, FrameKind::Retire), Ok(FrameKind::Retire));
    let unknown = DataError::UnknownKind { what: "a frame", found: 9 };
    assert_eq!(frame(flags::KIND_REQUIRED, later), Err(unknown));
    let requirement = DataError::UnknownRequirement { what: "a frame", bits: 0x0400 };
    assert_eq!(frame(0x0400, FrameKind::Retire), Err(requirement));
}

#[test]
fn an_extension_of_a_later_version_is_checksummed_and_skipped() {
    let runs = [data(5, 1)];
    let frame = Frame { extension_bytes: 20, ..frame_of(&runs) };
    let mut bytes = written(&frame, &runs);
    bytes.extend_from_slice(&[7; 20]);
    let bytes = signed(bytes);
    assert_eq!(read(&bytes), Ok((frame, runs.to_vec())));
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(read(&flipped), Err(DataError::Checksum { .. })));
}

/// A greeting with some of its bytes changed and its checksum right.
fn greeting(change: impl FnOnce(&mut Vec<u8>)) -> Result<DataHello, DataError> {
    let mut bytes = DataHello::new([1; 16], 2, 3, Role::Urgent).as_bytes().to_vec();
    change(&mut bytes);
    let length = u16::try_from(bytes.len()).unwrap();
    bytes[6..8].copy_from_slice(&length.to_le_bytes());
    let (at, checksum) = (bytes.len() - 4, tail_of(&bytes));
    bytes[at..].copy_from_slice(checksum.as_bytes());
    DataHello::read(&bytes)
}

#[test]
fn greetings_of_later_versions_are_understood_as_far_as_they_allow_it() {
    let plain = greeting(|_| {}).unwrap();
    assert_eq!((plain.channel(), plain.connection(), plain.role()), (2, 3, Role::Urgent));
    assert_eq!((plain.token(), plain.session()), ([1; 16], Session::default()));
    // Version 9 that still speaks ours, with more to say and an optional flag.
    let later = greeting(|bytes| {
        bytes[4] = 9;
        bytes[48] = 1;
        bytes.splice(60..60, [5; 100]);
    });
    assert_eq!(later.map(|hello| hello.connection()), Ok(3));
    let only_later = greeting(|bytes| (bytes[4], bytes[8]) = (9, 8)).unwrap_err();
    assert_eq!(only_later, DataError::Version { oldest: 8, newest: 9 });
    assert_eq!(Verdict::about(&only_later), Some((Verdict::WrongVersion, 9)));
    let older = greeting(|bytes| bytes[4] = 1).unwrap_err();
    assert_eq!(older, DataError::Version { oldest: 1, newest: 1 });
    let requirement = greeting(|bytes| bytes[51] = 0x80).unwrap_err();
    assert_eq!(Verdict::about(&requirement), Some((Verdict::UnknownRequirement, 0x8000_0000)));
    let role = greeting(|bytes| bytes[52] = 6).unwrap_err();
    assert_eq!(Verdict::about(&role), Some((Verdict::UnknownRole, 6)));
    let longer = greeting(|bytes| bytes.resize(DataHello::BYTES_MAX + 1, 0)).unwrap_err();
    assert!(matches!(longer, DataError::Length { .. }) && Verdict::about(&longer).is_none());
}

#[test]
fn every_verdict_reads_as_it_was_written() {
    for verdict in [
        Verdict::Welcome,
        Verdict::WrongToken,
        Verdict::WrongVersion,
        Verdict::NotExpected,
        Verdict::UnknownRole,
        Verdict::UnknownRequirement,
        Verdict::Busy,
    ] {
        let answer = (verdict, 7);
        assert_eq!(DataWelcome::read(&zerocopy::transmute!(DataWelcome::new(answer))), Ok(answer));
    }
}
