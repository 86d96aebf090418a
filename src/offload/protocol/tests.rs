//! Every message is read as it was written, and no bytes make anything but a message within them or an error.

use proptest::prelude::*;

use super::*;
use crate::kvm::Until;
use crate::layout::PageIndex;

fn run() -> impl Strategy<Value = PageRun> {
    (any::<u64>(), any::<u64>()).prop_map(|(first, pages)| PageRun { first: PageIndex(first), pages })
}

fn offer() -> impl Strategy<Value = Offer> {
    let bytes = prop::collection::vec(any::<u8>(), 0..200);
    let blocks = prop::collection::vec(("[!-~]{0,64}", run()), 0..5);
    ("[!-~]{0,64}", bytes, 0..4096_u32, prop::collection::vec(run(), 0..9), blocks)
        .prop_map(|(vm_id, description, vcpus, ram, blocks)| Offer { vm_id, description, vcpus, ram, blocks })
}

fn message() -> impl Strategy<Value = Message> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..300);
    let end = prop::sample::select(vec![End::Moved, End::Stays, End::Unconfirmed, End::Arrived]);
    let role = prop::sample::select(vec![Role::Source, Role::Destination]);
    let taker = prop::sample::select(vec![Taker::OffloadProcess, Taker::VmmOnRings, Taker::VmmOnBitmap]);
    let harvest = [Harvest::All, Harvest::Protected, Harvest::Paused, Harvest::Final];
    let harvest = prop::sample::select(harvest.to_vec());
    let until = prop::sample::select(vec![Until::Touched, Until::Written]);
    let range = (run(), until).prop_map(|(pages, until)| Protection { pages, until });
    let runs = || prop::collection::vec(run(), 0..20);
    prop_oneof![
        (any::<u16>(), any::<u16>(), role).prop_map(|(newest, oldest, role)| Message::Hello {
            newest,
            oldest,
            role
        }),
        (any::<u16>(), taker, any::<u32>(), 0..4096_u32, 0..1024_u32, "[!-~]{0,64}", bytes()).prop_map(
            |(version, taker, ring_entries, vcpus, regions, vm_id, description)| Message::Lent {
                version,
                taker,
                ring_entries,
                vcpus,
                regions,
                vm_id,
                description
            }
        ),
        (any::<u32>(), run(), any::<u64>(), any::<bool>(), "[!-~]{0,64}").prop_map(
            |(slot, pages, offset, tracked, name)| Message::Region {
                slot: SlotId(slot),
                pages,
                offset,
                tracked,
                name
            }
        ),
        (any::<u32>(), any::<u32>()).prop_map(|(index, position)| Message::Vcpu { index, position }),
        "[ -~]{0,100}".prop_map(|text| Message::Refuse { text }),
        offer().prop_map(Message::Offer),
        (any::<u32>(), any::<bool>()).prop_map(|(entries, slept)| Message::ResetCount { entries, slept }),
        (any::<u32>(), any::<bool>())
            .prop_map(|(slot, enabled)| Message::SetLogging { slot: SlotId(slot), enabled }),
        any::<u32>().prop_map(|slot| Message::CanProtect { slot: SlotId(slot) }),
        (any::<u32>(), prop::collection::vec(range, 0..20))
            .prop_map(|(slot, ranges)| Message::Protect { slot: SlotId(slot), ranges }),
        any::<bool>().prop_map(|telling| Message::Observe { telling }),
        harvest.prop_map(Message::Harvest),
        runs().prop_map(|runs| Message::ProtectBehind { runs }),
        runs().prop_map(|runs| Message::GiveBack { runs }),
        (prop::option::of(prop::collection::vec(any::<u64>(), 0..20)), any::<u64>())
            .prop_map(|(vcpus, others)| Message::Observed { vcpus, others }),
        prop::collection::vec(any::<(u32, u32)>(), 0..20).prop_map(Message::Vcpus),
        any::<[u64; 13]>().prop_map(|words| Message::Figures(figures_of(&words).unwrap())),
        any::<Option<u64>>().prop_map(|running| Message::SaveDeviceState { running }),
        any::<u32>().prop_map(|index| Message::Kick { index }),
        bytes().prop_map(|piece| Message::LoadDeviceState { piece }),
        bytes().prop_map(|piece| Message::MachineState { piece }),
        (end, "[ -~]{0,100}").prop_map(|(end, text)| Message::Ended { end, text }),
        "[ -~]{0,100}".prop_map(|text| Message::Failed { text }),
        bytes().prop_map(|bytes| Message::Piece { bytes }),
        (any::<bool>(), runs()).prop_map(|(more, runs)| Message::Runs { more, runs }),
        any::<u64>().prop_map(Message::Bytes),
        prop::sample::select(vec![
            Message::ResetRings,
            Message::SlotGone,
            Message::SlotDiffers,
            Message::StartWriters,
            Message::DrainWriters,
            Message::StopWriters,
            Message::StartTracking,
            Message::StopTracking,
            Message::AskFigures,
            Message::Pause,
            Message::Resume,
            Message::Quiesce,
            Message::SaveState,
            Message::DeviceStateBytesLeft,
            Message::DiscardedPages,
            Message::HandOver,
            Message::RestoreState,
            Message::Prepare,
            Message::Release,
            Message::Enough,
            Message::Done,
        ]),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(message in message()) {
        prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn no_bytes_are_believed_beyond_their_end(kind in any::<u8>(), bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let packet = [&[kind], &bytes[..]].concat();
        if let Ok(message) = Message::decode(&packet) {
            // Nothing was made up: what was read is written as long as it came, but for text that could not be printed.
            let lossy = matches!(message, Message::Refuse { .. } | Message::Failed { .. } | Message::Ended { .. });
            prop_assert!(lossy || message.encode().len() == packet.len(), "{message:?}");
        }
    }

    #[test]
    fn a_message_that_lost_or_gained_bytes_is_another_one_or_none(message in message(), cut in 1..20_usize) {
        let packet = message.encode();
        let shorter = &packet[..packet.len().saturating_sub(cut)];
        prop_assert_ne!(Message::decode(shorter), Ok(message.clone()));
        let longer = [&packet[..], &vec![7; cut]].concat();
        prop_assert_ne!(Message::decode(&longer), Ok(message));
    }
}

#[test]
fn every_bound_is_enforced() {
    let refused = |message: &Message| Message::decode(&message.encode()).unwrap_err();
    let lent = |vcpus, regions, bytes| Message::Lent {
        taker: Taker::OffloadProcess,
        version: 1,
        ring_entries: 1024,
        vcpus,
        regions,
        vm_id: String::new(),
        description: vec![0; bytes],
    };
    assert_eq!(refused(&lent(4097, 1, 0)), "too many");
    assert_eq!(refused(&lent(1, 1025, 0)), "too many");
    assert_eq!(refused(&lent(1, 1, DESCRIPTION_BYTES_MAX + 1)), "a part is too long");
    assert_eq!(refused(&Message::Piece { bytes: vec![0; PIECE_BYTES_MAX + 1] }), "a part is too long");
    let named = Message::Region {
        slot: SlotId(0),
        pages: PageRun { first: PageIndex(0), pages: 1 },
        offset: 0,
        tracked: true,
        name: "n".repeat(65),
    };
    assert_eq!(refused(&named), "a part is too long");
}

#[test]
fn the_longest_messages_fit_a_packet() {
    let run = PageRun { first: PageIndex(u64::MAX), pages: u64::MAX };
    let offer = Offer {
        vm_id: "n".repeat(NAME_BYTES_MAX),
        description: vec![0; DESCRIPTION_BYTES_MAX],
        vcpus: 1,
        ram: vec![run; REGIONS_MAX],
        blocks: vec![("n".repeat(NAME_BYTES_MAX), run); BLOCKS_MAX],
    };
    let piece = Message::Piece { bytes: vec![0; PIECE_BYTES_MAX] };
    let runs = Message::Runs { more: true, runs: vec![run; RUNS_MAX] };
    for message in [Message::Offer(offer), piece, runs] {
        let packet = message.encode();
        assert!(packet.len() <= PACKET_BYTES_MAX, "{}: {}", message.name(), packet.len());
        assert_eq!(Message::decode(&packet), Ok(message));
    }
}

#[test]
fn an_error_is_cut_at_a_whole_character_and_cannot_move_a_terminals_cursor() {
    let text = format!("\u{1b}[2J{}", "ä".repeat(TEXT_BYTES_MAX));
    let Ok(Message::Failed { text }) = Message::decode(&Message::Failed { text }.encode()) else {
        panic!("not what was sent");
    };
    assert!(text.starts_with(" [2Jä") && text.ends_with('ä'), "{text}");
}
