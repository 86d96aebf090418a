//! What somebody else says, made fit to be shown: a text from a peer, a monitor client, a child or a guest may be
//! endless, and may hold what a terminal obeys.

/// Bytes of a foreign text that are shown.
const SHOWN_BYTES_MAX: usize = 2048;

/// `text` without anything that a terminal would obey, and with at most 2048 bytes of it; where there is more, the text
/// says so.
pub fn printable(text: &str) -> String {
    let mut shown = String::new();
    for character in text.chars() {
        let length_before = shown.len();
        if is_obeyed(character) {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
        if shown.len() > SHOWN_BYTES_MAX {
            shown.truncate(length_before);
            shown.push_str("… (more was said)");
            break;
        }
    }
    shown
}

/// Control characters, and those that turn the direction of the text around them.
fn is_obeyed(character: char) -> bool {
    let turns_direction =
        matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || turns_direction || matches!(character, '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        let text = "\u{1b}[2Jgone\u{7}\nerror: \u{9b}31m\u{202e}txt";
        assert_eq!(printable(text), r"\u{1b}[2Jgone\u{7}\nerror: \u{9b}31m\u{202e}txt");
    }

    #[test]
    fn ordinary_text_stays_as_it_is() {
        for text in ["", "cancelled; the VM runs on here", "Größe 2 µs, „ja“"] {
            assert_eq!(printable(text), text);
        }
    }

    #[test]
    fn an_endless_text_is_cut_and_says_so() {
        for character in ["a", "ß", "\u{1b}"] {
            let shown = printable(&character.repeat(1 << 20));
            assert!(shown.len() < SHOWN_BYTES_MAX + 40, "{}", shown.len());
            assert!(shown.ends_with("(more was said)"), "{shown}");
        }
    }

    #[test]
    fn a_text_that_was_made_printable_stays_as_it_is() {
        let once = printable("\u{1b}[2J\n");
        assert_eq!(printable(&once), once);
    }
}
