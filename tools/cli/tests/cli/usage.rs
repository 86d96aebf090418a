//! How the program is called: help, completions, and calls that are wrong.

use crate::support::{full_disk, ringferry, ringferry_writing_to};

/// Every command below `path`, groups of commands included, as the program's own help lists them.
fn commands(path: &[&str]) -> Vec<Vec<String>> {
    let help = ringferry(&[path, &["--help"]].concat()).stdout;
    let list =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let mut found = Vec::new();
    // Deeper lines go on with the description of the one above.
    let names = list.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    for name in names.filter(|name| !["", "help"].contains(name)) {
        let command = [path, &[name]].concat();
        found.push(command.iter().map(ToString::to_string).collect());
        found.extend(commands(&command));
    }
    found
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
fn the_help_of_every_command_shows_examples_that_name_it() {
    let commands = commands(&[]);
    assert!(commands.contains(&vec!["doctor".to_owned()]), "{commands:?}");
    for command in commands {
        let command = command.join(" ");
        let help = ringferry(&command.split(' ').chain(["--help"]).collect::<Vec<_>>()).stdout;
        let (_, examples) =
            help.split_once("\nExamples").unwrap_or_else(|| panic!("{command} has no examples"));
        assert!(examples.contains(&format!("\n  ringferry {command}")), "{command}: {examples}");
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
    let run = ringferry_writing_to(&["completions", "bash"], full_disk());
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.starts_with("error: "), "{}", run.stderr);
}

fn pipe_without_reader() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

#[test]
fn the_guest_image_is_written_byte_for_byte_to_a_file_and_to_standard_output() {
    let directory = tempfile::tempdir().unwrap();
    let [file, piped] = ["file", "piped"].map(|name| directory.path().join(name));
    let run = ringferry(&["guest-image", file.to_str().unwrap()]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), ""), "{run:?}");
    assert_eq!(std::fs::read(&file).unwrap(), ringferry_testvm::IMAGE);

    let run = ringferry_writing_to(&["guest-image", "-"], std::fs::File::create(&piped).unwrap());
    assert_eq!(run.code, Some(0), "{run:?}");
    assert_eq!(std::fs::read(&piped).unwrap(), ringferry_testvm::IMAGE);
}

#[test]
fn a_file_that_cannot_be_written_is_named_with_the_reason() {
    let run = ringferry(&["guest-image", "/no/such/directory/guest.img"]);
    assert_eq!(run.code, Some(1));
    for part in ["error: ", "/no/such/directory/guest.img", "No such file"] {
        assert!(run.stderr.contains(part), "{part:?} is not in: {}", run.stderr);
    }
}
