//! How a command speaks: text for people or JSON lines for programs on standard output, errors and logs on standard
//! error.
//!
//! A reader that goes away (`ringferry doctor | head -1`) ends the talking, not the work: a migration must not
//! fail because nobody watches it. A command that holds a VM waits for no reader either ([`Output::for_vm`]).

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use serde::Serialize;

use crate::background::{Background, Worth};

/// How long a command that ends waits for those who read its last words.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Where and in which form a command prints. Colours written to it reach a terminal only, and `NO_COLOR` is
/// honoured.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
    worth: Worth,
    /// Where standard output goes that nobody may wait for.
    stdout: Option<&'static Background>,
    stderr: &'static Background,
}

#[derive(Serialize)]
struct ErrorObject {
    kind: &'static str,
    message: String,
    causes: Vec<String>,
}

impl Output {
    /// JSON lines, or text, written as fast as their reader takes them.
    ///
    /// # Errors
    ///
    /// The kernel gives this process no further thread or descriptor.
    pub fn new(json: bool) -> io::Result<Self> {
        let stderr = in_background("stderr", io::stderr())?;
        Ok(Self { json, worth: Worth::Report, stdout: None, stderr })
    }

    /// The same for a command that holds a VM: no write fails or blocks from here on. What is lost is told at the
    /// [end](Self::finish).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn for_vm(self) -> io::Result<Self> {
        Ok(Self { stdout: Some(in_background("stdout", io::stdout())?), ..self })
    }

    /// The same for lines that the next one replaces: the oldest of them are dropped when their reader is behind.
    pub fn progress(self) -> Self {
        Self { worth: Worth::Progress, ..self }
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
        match self.stdout {
            Some(background) => background.push(self.worth, text.to_vec()),
            None => write_to_reader(anstream::stdout().lock(), text)?,
        }
        Ok(())
    }

    /// Writes bytes that are no text: whatever they are, they are not taken for colours.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn binary(self, bytes: &[u8]) -> io::Result<()> {
        write_to_reader(io::stdout().lock(), bytes)
    }

    /// Tells people something that belongs to no result. Never waits, and never fails.
    pub fn note(self, text: impl Display) {
        self.stderr.push(Worth::Report, format!("{text}\n").into_bytes());
    }

    /// Where the logs go: the newest of them, when nobody takes them.
    pub fn log(self) -> impl Write {
        Log(self.stderr)
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
        let mut text = format!("{bold_red}error:{bold_red:#} {error}");
        for cause in &causes {
            text.push_str(&format!("\n  because: {cause}"));
        }
        self.note(text);
        if self.json {
            // There is nobody left to tell.
            let _ = self.object(&ErrorObject { kind: "error", message: error.to_string(), causes });
        }
    }

    /// Waits a moment for those who read the last words. False if a part of standard output is lost; that is then told
    /// on standard error.
    pub fn finish(self) -> bool {
        let loss = self.stdout.and_then(|stdout| stdout.finish(LAST_WORDS));
        if let Some(loss) = &loss {
            self.note(format_args!("standard output could not be written: {loss}"));
        }
        // There is nobody left to tell what standard error has lost.
        let _ = self.stderr.finish(LAST_WORDS);
        loss.is_none()
    }
}

struct Log(&'static Background);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(Worth::Progress, line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A writer of a stream that lives as long as the process. It has a descriptor of its own, because the standard
/// library's is locked while a write to it blocks, and is flushed at exit.
fn in_background(name: &str, stream: impl AsFd) -> io::Result<&'static Background> {
    let own = std::fs::File::from(stream.as_fd().try_clone_to_owned()?);
    Ok(Box::leak(Box::new(Background::new(name, anstream::AutoStream::auto(own))?)))
}

fn write_to_reader(mut stdout: impl Write, bytes: &[u8]) -> io::Result<()> {
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}
