//! How a command speaks: text for people or JSON lines for programs on standard output, errors on standard
//! error.
//!
//! A reader that goes away (`ringferry doctor | head -1`) ends the talking, not the work: a migration must not
//! fail because nobody watches it.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;

/// Where and in which form a command prints. Colours written to it reach a terminal only, and `NO_COLOR` is
/// honoured.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

#[derive(Serialize)]
struct ErrorObject {
    kind: &'static str,
    message: String,
    causes: Vec<String>,
}

impl Output {
    /// JSON lines, or text.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether the user asked for JSON: then standard output carries nothing but [`object`](Self::object)s.
    pub fn json(self) -> bool {
        self.json
    }

    /// Whether somebody watches a terminal, so that a live display makes sense.
    pub fn live(self) -> bool {
        !self.json && io::stdout().is_terminal() && io::stderr().is_terminal()
    }

    /// Prints one line of text.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn line(self, text: impl Display) -> io::Result<()> {
        self.write(format!("{text}\n").as_bytes())
    }

    /// Prints `value`, which serializes as an object with a field `kind`, as one line of JSON.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn object(self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.write(&line)
    }

    /// Writes text to standard output, in one piece.
    ///
    /// # Errors
    ///
    /// Standard output cannot be written, for another reason than that its reader is gone.
    pub fn write(self, text: &[u8]) -> io::Result<()> {
        write_to_reader(anstream::stdout().lock(), text)
    }

    /// Writes bytes that are no text: whatever they are, they are not taken for colours.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn binary(self, bytes: &[u8]) -> io::Result<()> {
        write_to_reader(io::stdout().lock(), bytes)
    }

    /// Tells why the command failed: the error and below it its causes, one a line; with JSON, also as an
    /// object of kind `error`.
    pub fn error(self, error: &anyhow::Error) {
        // Many errors end with their cause's own words: those are not repeated.
        let mut told = error.to_string();
        let mut causes = Vec::new();
        for cause in error.chain().skip(1).map(ToString::to_string) {
            if !told.contains(&cause) {
                told.push_str(&cause);
                causes.push(cause);
            }
        }
        let bold_red = anstyle::AnsiColor::Red.on_default().bold();
        let mut text = format!("{bold_red}error:{bold_red:#} {error}\n");
        for cause in &causes {
            text.push_str(&format!("  because: {cause}\n"));
        }
        // There is nobody left to tell if standard error is gone.
        let _ = anstream::stderr().write_all(text.as_bytes());
        if self.json {
            let _ = self.object(&ErrorObject { kind: "error", message: error.to_string(), causes });
        }
    }
}

fn write_to_reader(mut stdout: impl Write, bytes: &[u8]) -> io::Result<()> {
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}
