//! How the program is called: help, completions, and calls that are wrong.

use crate::support::{ringferry, ringferry_writing_to};

/// Every command there is, from the program's own completions.
fn commands() -> Vec<String> {
    let script = ringferry(&["completions", "fish"]).stdout;
    let mut commands: Vec<String> = script
        .lines()
        .filter(|line| line.contains("__fish_ringferry_needs_command"))
        .filter_map(|line| Some(line.split_once(" -a \"")?.1.split_once('"')?.0.to_owned()))
        .filter(|command| command != "help")
        .collect();
    commands.sort();
    commands.dedup();
    assert!(commands.contains(&"doctor".to_owned()), "{script}");
    commands
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_would_be_right() {
    for args in
        [&["dcotor"][..], &["doctor", "--no-such-option"], &["doctor", "extra"], &["completions", "dos"]]
    {
        let run = ringferry(args);
        assert_eq!(run.code, Some(2), "{args:?}: {run:?}");
        assert!(run.stderr.starts_with("error: "), "{args:?}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{args:?}: {}", run.stdout);
    }
    let mistyped = ringferry(&["dcotor"]);
    assert!(mistyped.stderr.contains("'doctor'"), "{}", mistyped.stderr);
}

#[test]
fn no_arguments_show_the_help_and_exit_with_2() {
    let run = ringferry(&[]);
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("Usage: ringferry"), "{}", run.stderr);
}

#[test]
fn the_help_of_every_command_shows_examples() {
    for command in commands() {
        let run = ringferry(&[&command, "--help"]);
        assert_eq!(run.code, Some(0), "{command}");
        let example = format!("Examples:\n  ringferry {command}");
        assert!(run.stdout.contains(&example), "{command}: {}", run.stdout);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    for args in [&["completions", "bash"][..], &["doctor", "--help"]] {
        let run = ringferry_writing_to(args, pipe_without_reader());
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let run = ringferry_writing_to(&["completions", "bash"], full);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.starts_with("error: "), "{}", run.stderr);
}

fn pipe_without_reader() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}
