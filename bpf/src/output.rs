//! What goes to standard output when it is no live table: lines of text, JSON or CSV.

use std::io::{self, Write};

use ringferry_bpf::{Look, PAGE_BYTES, Session};

mod columns;
mod json;
mod plain;

pub(crate) use columns::{COLUMNS, Column, headline, that_fit};
pub(crate) use plain::{region_lines, sampling_line};

/// Which vCPUs were asked for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Choice {
    pub vcpu: Option<u32>,
    pub top: Option<u32>,
}

/// One of the three forms.
#[derive(Debug)]
pub(crate) struct Output {
    choice: Choice,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Plain(plain::Plain),
    Json,
    Csv,
}

impl Output {
    pub(crate) fn plain(choice: Choice) -> Self {
        Self { choice, form: Form::Plain(plain::Plain::default()) }
    }

    pub(crate) fn json(choice: Choice) -> Self {
        Self { choice, form: Form::Json }
    }

    pub(crate) fn csv(choice: Choice) -> Self {
        Self { choice, form: Form::Csv }
    }

    /// Said once everything counts, before the first interval.
    pub(crate) fn attached(&self, session: &Session) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        match &self.form {
            Form::Plain(_) => {}
            Form::Json => json::attached(&mut out, session)?,
            Form::Csv => json::csv_header(&mut out)?,
        }
        Ok(out.flush()?)
    }

    pub(crate) fn look(&mut self, look: &Look) -> anyhow::Result<()> {
        let mut out = anstream::stdout().lock();
        match &mut self.form {
            Form::Plain(plain) => plain.look(&mut out, look, self.choice)?,
            Form::Json => json::look(&mut out, look, self.choice)?,
            Form::Csv => json::csv_look(&mut out, look, self.choice)?,
        }
        Ok(out.flush()?)
    }

    pub(crate) fn summary(&self, session: &Session) -> anyhow::Result<()> {
        let mut out = anstream::stdout().lock();
        match &self.form {
            Form::Plain(_) => plain::summary(&mut out, session, self.choice)?,
            Form::Json => json::summary(&mut out, session, self.choice)?,
            // A second table would break the first one.
            Form::Csv => {}
        }
        Ok(out.flush()?)
    }
}

/// Pages as MiB.
pub(crate) fn mib(pages: f64) -> f64 {
    pages * PAGE_BYTES as f64 / f64::from(1 << 20)
}
