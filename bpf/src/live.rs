//! The live table on a terminal, in the manner of bpftop and kvm_stat: sort, filter, pause, quit.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Row as TableRow, Table as Widget};
use ratatui::{DefaultTerminal, Frame};
use ringferry_bpf::{Look, RingId, Row, bars};

use crate::output::{COLUMNS, Choice, Column, headline, region_lines, sampling_line, that_fit};

/// Intervals that the trend shows where there is room.
const TREND: usize = 12;
/// Less than this says nothing.
const TREND_MIN: usize = 6;
/// How soon a signal or a resize is noticed.
const TICK: Duration = Duration::from_millis(100);
/// The column sorted by at first.
const PAGES_PER_S: usize = 4;

const KEYS: &str = " q quit  p pause  < > sort by  r reverse  / filter";

/// What is on the screen, and how the user wants it.
#[derive(Debug)]
struct View {
    choice: Choice,
    look: Option<Look>,
    /// Of every look, also those that a pause keeps from the screen.
    trends: HashMap<RingId, VecDeque<u64>>,
    /// The trends as they are shown.
    trend_bars: HashMap<RingId, String>,
    /// Indices of the columns that the terminal has room for.
    columns: Vec<usize>,
    /// Intervals of the trend that there is room for beside them.
    trend_cells: usize,
    sort: usize,
    ascending: bool,
    filter: String,
    typing: bool,
    paused: bool,
}

/// The terminal in its alternate screen; dropping this gives it back.
#[derive(Debug)]
pub(crate) struct Table {
    /// Until it is dropped.
    terminal: Option<DefaultTerminal>,
    view: View,
}

impl Table {
    pub(crate) fn open(choice: Choice) -> io::Result<Self> {
        let mut table = Self { terminal: Some(ratatui::try_init()?), view: View::new(choice) };
        table.draw()?;
        Ok(table)
    }

    /// Takes over a new look, unless the display is paused.
    pub(crate) fn show(&mut self, look: &Look) -> io::Result<()> {
        self.view.take(look);
        self.draw()
    }

    /// Handles keys until then; returns whether the user wants to quit, or has hung up.
    pub(crate) fn wait(&mut self, until: Instant, stop: &Receiver<()>) -> io::Result<bool> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if stop.try_recv().is_ok() || is_gone_within(left.min(TICK))? {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            while event::poll(Duration::ZERO)? {
                if let Event::Key(key) = event::read()?
                    && key.kind == KeyEventKind::Press
                    && self.view.press(key)
                {
                    return Ok(true);
                }
                self.draw()?;
            }
        }
    }

    fn draw(&mut self) -> io::Result<()> {
        let drawn =
            self.terminal.as_mut().map(|terminal| terminal.draw(|frame| self.view.draw(frame)).map(drop));
        drawn.unwrap_or(Ok(()))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        match self.terminal.take() {
            // It cannot be given back, and ratatui would panic when it cannot even say so.
            Some(terminal) if is_gone_within(Duration::ZERO).unwrap_or(true) => std::mem::forget(terminal),
            _ => ratatui::restore(),
        }
    }
}

/// Waits so long for input or a signal. Returns whether the terminal is gone: crossterm would read its end for ever.
fn is_gone_within(time: Duration) -> io::Result<bool> {
    let stdin = io::stdin();
    let mut terminal = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    match poll(&mut terminal, PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO)) {
        Ok(_) => Ok(terminal[0].revents().is_some_and(|events| {
            events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL)
        })),
        // A resize, or the end.
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl View {
    fn new(choice: Choice) -> Self {
        Self {
            choice,
            look: None,
            trends: HashMap::new(),
            trend_bars: HashMap::new(),
            columns: (0..COLUMNS.len()).collect(),
            trend_cells: 0,
            sort: PAGES_PER_S,
            ascending: false,
            filter: String::new(),
            typing: false,
            paused: false,
        }
    }

    fn take(&mut self, look: &Look) {
        self.trends.retain(|id, _| look.rows.iter().any(|row| row.id == *id));
        for row in &look.rows {
            let trend = self.trends.entry(row.id).or_default();
            if trend.len() == TREND {
                trend.pop_front();
            }
            trend.push_back(row.dirty_pages.unwrap_or(0));
        }
        if !self.paused {
            self.look = Some(look.clone());
            self.trend_bars =
                self.trends.iter_mut().map(|(id, trend)| (*id, bars(trend.make_contiguous()))).collect();
        }
    }

    /// Moves the sort order by so many of the columns that are seen.
    fn sort_by_another(&mut self, steps: usize) {
        let at = self.columns.iter().position(|&column| column == self.sort).unwrap_or(0);
        if let Some(&column) = self.columns.get((at + steps) % self.columns.len().max(1)) {
            self.sort = column;
        }
    }

    /// Returns whether this key quits.
    fn press(&mut self, key: KeyEvent) -> bool {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return key.code == KeyCode::Char('c');
        }
        if self.typing {
            match key.code {
                KeyCode::Enter => self.typing = false,
                KeyCode::Esc => (self.typing, self.filter) = (false, String::new()),
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(character) => self.filter.push(character),
                _ => {}
            }
            return false;
        }
        match key.code {
            KeyCode::Char('q') => return true,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('>') | KeyCode::Right => self.sort_by_another(1),
            KeyCode::Char('<') | KeyCode::Left => self.sort_by_another(self.columns.len().saturating_sub(1)),
            KeyCode::Char('r') => self.ascending = !self.ascending,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Esc => self.filter.clear(),
            _ => {}
        }
        false
    }

    /// The rows to show, in their order. The filter looks at every cell.
    fn rows<'a>(&self, look: &'a Look) -> Vec<&'a Row> {
        let matches = |row: &Row| {
            self.filter.is_empty()
                || COLUMNS.iter().any(|column| (column.cell)(row, look.interval).contains(&self.filter))
        };
        let mut rows = crate::chosen(look, self.choice).0;
        rows.retain(|row| matches(row));
        let rank = COLUMNS[self.sort].rank;
        rows.sort_by(|one, other| {
            let order = rank(one).total_cmp(&rank(other));
            if self.ascending { order } else { order.reverse() }
        });
        rows
    }

    fn draw(&mut self, frame: &mut Frame) {
        let width = usize::from(frame.area().width);
        self.columns = that_fit(width);
        let used: usize = self.columns.iter().map(|&index| COLUMNS[index].width + 1).sum();
        self.trend_cells =
            Some(width.saturating_sub(used)).filter(|&left| left >= TREND_MIN).unwrap_or(0).min(TREND);
        let strips: Vec<Line> =
            self.look.iter().flat_map(|look| &look.vms).flat_map(below).map(Line::from).collect();
        // The strips take at most half of the screen.
        let strip_lines = u16::try_from(strips.len()).unwrap_or(u16::MAX).min(frame.area().height / 2);
        let [top, middle, below, bottom] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(2),
            Constraint::Length(strip_lines),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(self.top_line().bold(), top);
        if let Some(look) = &self.look {
            frame.render_widget(self.table(look), middle);
        }
        frame.render_widget(Text::from(strips), below);
        frame.render_widget(self.bottom_line(), bottom);
    }

    fn top_line(&self) -> Line<'static> {
        match &self.look {
            Some(look) => {
                let paused = if self.paused { "  PAUSED" } else { "" };
                Line::from(format!(" {:.0}s  {}{paused}", look.time.as_secs_f64(), headline(look)))
            }
            None => Line::from(" waiting for the first interval"),
        }
    }

    fn bottom_line(&self) -> Line<'static> {
        if self.typing {
            Line::from(format!(" filter: {}_   Enter keep   Esc clear", self.filter)).reversed()
        } else {
            let mut text = KEYS.to_owned();
            if !self.filter.is_empty() {
                text += &format!("  filter: {} (Esc clears)", self.filter);
            }
            if self.columns.len() < COLUMNS.len() {
                text += &format!("  {} more columns in a wider window", COLUMNS.len() - self.columns.len());
            }
            Line::from(text).reversed()
        }
    }

    fn table<'a>(&'a self, look: &'a Look) -> Widget<'a> {
        let columns = || self.columns.iter().map(|&index| (index, &COLUMNS[index]));
        let titles = columns().map(|(index, column)| {
            let arrow = if index != self.sort {
                ""
            } else if self.ascending {
                "▲"
            } else {
                "▼"
            };
            let style = if index == self.sort { Style::new().fg(Color::Cyan) } else { Style::new() };
            cell(column, format!("{}{arrow}", column.title)).style(style)
        });
        let titles = titles.chain([Cell::from("TREND")]);
        let rows = self.rows(look).into_iter().map(|row| {
            let cells = columns().map(|(_, column)| cell(column, (column.cell)(row, look.interval)));
            let trend: Vec<char> =
                self.trend_bars.get(&row.id).map_or_else(Vec::new, |bars| bars.chars().collect());
            let trend: String = trend[trend.len().saturating_sub(self.trend_cells)..].iter().collect();
            TableRow::new(cells.chain([Cell::from(trend).style(Style::new().fg(Color::Green))]))
                .style(style(row))
        });
        let widths =
            columns().map(|(_, column)| Constraint::Length(u16::try_from(column.width).unwrap_or(16)));
        let trend = Constraint::Length(u16::try_from(self.trend_cells).unwrap_or(0));
        Widget::new(rows, widths.chain([trend])).header(TableRow::new(titles).add_modifier(Modifier::BOLD))
    }
}

/// The lines about a VM as a whole.
fn below(vm: &ringferry_bpf::VmLook) -> Vec<String> {
    region_lines(vm, 64).into_iter().chain(sampling_line(vm)).collect()
}

fn cell(column: &Column, text: String) -> Cell<'static> {
    let alignment = if column.left { Alignment::Left } else { Alignment::Right };
    Cell::from(Text::from(text).alignment(alignment))
}

fn style(row: &Row) -> Style {
    if row.overflows_so_far > 0 {
        Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)
    } else if row.dirty_pages.is_none() || row.ended {
        Style::new().fg(Color::DarkGray)
    } else {
        Style::new()
    }
}
