use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

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
    let checksum = frame_checksum(&bytes);
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
        prop_assert!(DataHello::read(bytes.first_chunk().unwrap()).is_err());
        prop_assert!(DataWelcome::read(bytes.first_chunk().unwrap()).is_err());
        prop_assert!(Acknowledgement::read(bytes.first_chunk().unwrap()).is_err());
    }

    #[test]
    fn whatever_a_valid_checksum_covers_is_bounded_and_in_order(
        words in prop::collection::vec((any::<u64>(), any::<u32>(), 0..3_u32), 1..50),
        small in any::<bool>(),
        payload in any::<u32>(),
    ) {
        let mut bytes = written(&Frame { run_count: 0, payload_bytes: payload, ..frame_of(&[]) }, &[]);
        bytes[24..28].copy_from_slice(&u32::try_from(words.len()).unwrap().to_le_bytes());
        for (first, pages, kind) in words {
            let (first, pages) = if small { (first % 100, pages % 9) } else { (first, pages) };
            let run = WireRun { first: first.into(), pages: pages.into(), kind: kind.into() };
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
    assert_eq!(refused(&[data(u64::MAX, 1)]), DataError::Run { first: u64::MAX, pages: 1 });
    assert_eq!(refused(&[data(1 << 52, 1)]), DataError::Run { first: 1 << 52, pages: 1 });
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
    let shape = |frame: Frame| matches!(refused(frame), DataError::Shape { .. });
    assert!(shape(Frame { run_count: 0, ..ok }));
    assert!(shape(Frame { kind: FrameKind::Retire, ..ok }));
    assert!(shape(Frame { kind: FrameKind::Retire, run_count: 0, ..ok }));
}

#[test]
fn another_version_is_named_as_such() {
    let mut hello = DataHello::new([1; 16], 2, 3);
    assert_eq!(
        DataHello::read(&zerocopy::transmute!(hello)).map(|h| (h.channel(), h.connection())),
        Ok((2, 3))
    );
    hello.version = 9.into();
    assert_eq!(DataHello::read(&zerocopy::transmute!(hello)).unwrap_err(), DataError::Version { found: 9 });
    for verdict in [Verdict::Welcome, Verdict::WrongToken, Verdict::WrongVersion, Verdict::NotExpected] {
        assert_eq!(DataWelcome::read(&zerocopy::transmute!(DataWelcome::new(verdict))), Ok(verdict));
    }
}
