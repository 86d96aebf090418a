//! A VMM discards guest memory, registered or not.
#![expect(unsafe_code, reason = "memory is discarded by its address")]

use super::*;

fn discard(ram: &Ram, run: PageRun) {
    for host in ram.memory.host_runs(run).unwrap() {
        // SAFETY: memory of the test, to which nobody has a reference.
        let discarded = unsafe { libc::madvise(host.host.cast(), host.len_bytes(), libc::MADV_DONTNEED) };
        assert_eq!(discarded, 0, "{}", io::Error::last_os_error());
    }
}

/// Discards a run and writes its pages anew, as a guest does behind a balloon.
fn discard_and_rewrite(ram: &Ram, run: PageRun, generation: u64) {
    discard(ram, run);
    (run.first.0..run.end().0).for_each(|page| ram.write(PageIndex(page), generation));
}

#[test]
fn memory_that_was_discarded_and_written_anew_arrives_as_it_is_now() {
    let run = PageRun { first: PageIndex(0x180), pages: 40 };
    for discards_told in [false, true] {
        let source = Ram::new(REGIONS);
        source.fill(1);
        let (target, _receiver, address) = destination(&source);
        let options = SendOptions { zero_copy: ZeroCopy::AlwaysRegistered, ..options() };
        let discards = options.discards.clone();
        let mut sender = sender(&[address; 2], &source, options);
        sender.send_round(1, source.pages()).unwrap();
        discard_and_rewrite(&source, run, 2);
        if discards_told {
            discards.discarded(run);
        }
        sender.send_round(2, source.pages()).unwrap();
        let is_same = target.digest() == source.digest();
        assert_eq!(
            is_same, discards_told,
            "what the kernel has registered is the page that was there before"
        );
        let has_given_up = |channel: &ChannelSnapshot| {
            let reason = channel.sending.fallback.as_deref().unwrap_or_default();
            channel.sending.registered_bytes == 0 && reason.contains("discards guest memory")
        };
        assert_eq!(sender.counters().channels().iter().any(has_given_up), discards_told);
    }
}

#[test]
fn memory_is_registered_again_when_the_vmm_has_done_with_discarding_and_only_what_is_there() {
    let (gone, rewritten) =
        (PageRun { first: PageIndex(0x180), pages: 40 }, PageRun { first: PageIndex(0x1a0), pages: 8 });
    let source = Ram::new(REGIONS);
    source.fill(1);
    let (target, _receiver, address) = destination(&source);
    let options = SendOptions { zero_copy: ZeroCopy::AlwaysRegistered, ..options() };
    let discards = options.discards.clone();
    let mut sender = sender(&[address; 2], &source, options);
    let mut send = |round| {
        sender.send_round(round, source.pages()).unwrap();
        assert_eq!(target.digest(), source.digest(), "round {round}");
        let channels = sender.counters().channels().into_iter();
        channels.map(|channel| channel.sending.registered_bytes).max().unwrap() / 4096
    };
    let all = send(1);
    assert_eq!(all, 4660);
    // Twice: what was renewed ends as what came first.
    for round in [2, 5] {
        discard(&source, gone);
        discards.discarded(gone);
        (0..rewritten.pages).for_each(|i| source.write(PageIndex(rewritten.first.0 + i), u64::from(round)));
        assert_eq!(send(round), 0, "while it discards");
        assert_eq!(send(round + 1), 0, "nobody said that it is over");
        discards.settled();
        let registered = send(round + 2);
        assert_eq!(registered, all - (gone.pages - rewritten.pages), "the rest was given back, and stays so");
    }
}

#[test]
fn nothing_is_registered_unless_the_vmm_allows_it() {
    assert!(!SendOptions::default().register_memory);
    let source = Ram::new(REGIONS);
    source.fill(1);
    let (target, _receiver, address) = destination(&source);
    let options = SendOptions { zero_copy: ZeroCopy::Always, ..options() };
    let mut sender = sender(&[address; 2], &source, options);
    sender.send_round(1, source.pages()).unwrap();
    // Nobody is told, and nobody has to be.
    discard_and_rewrite(&source, PageRun { first: PageIndex(0x180), pages: 40 }, 2);
    sender.send_round(2, source.pages()).unwrap();
    assert_eq!(target.digest(), source.digest());
    assert!(sender.counters().channels().iter().all(|channel| channel.sending.registered_bytes == 0));
}
