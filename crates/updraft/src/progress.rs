//! Progress on standard error: bars with rate and time left on a terminal, a line now and then elsewhere.

use std::cell::Cell;
use std::fmt::Write;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use updraft_base::clock::Clock;
use updraft_base::units;
use updraft_train::waits::Waits;
use updraft_train::{Event, Observer};

/// Time between two lines of one task where there is no terminal: a log of an hour stays a few hundred lines.
const LINE_INTERVAL_NS: u64 = 10_000_000_000;

/// Where progress is shown.
pub struct Progress<'a>(Form<'a>);

enum Form<'a> {
    Bars(MultiProgress),
    Lines { clock: &'a dyn Clock, write: &'a dyn Fn(&str) },
}

/// One task in progress.
pub struct Task<'a> {
    form: TaskForm<'a>,
    label: String,
}

enum TaskForm<'a> {
    Bar(ProgressBar),
    Lines { clock: &'a dyn Clock, write: &'a dyn Fn(&str), total: u64, start_ns: u64, last_ns: Cell<u64> },
}

impl<'a> Progress<'a> {
    /// Bars on the terminal.
    pub fn bars() -> Progress<'a> {
        Progress(Form::Bars(MultiProgress::new()))
    }

    /// Lines, each given to `write`.
    pub fn lines(clock: &'a dyn Clock, write: &'a dyn Fn(&str)) -> Progress<'a> {
        Progress(Form::Lines { clock, write })
    }

    /// Says something once.
    pub fn note(&self, text: &str) {
        match &self.0 {
            // A line that the terminal does not take is no reason to stop the work.
            Form::Bars(bars) => drop(bars.println(text)),
            Form::Lines { write, .. } => write(text),
        }
    }

    /// Begins a task of `total` units, or of nobody knows how many where that is 0.
    pub fn task(&self, label: &str, total: u64, unit: &str) -> Task<'a> {
        let form = match &self.0 {
            Form::Bars(bars) => {
                let template = match total {
                    0 => format!("{{prefix:>12}} {{pos}} {unit} {{per_sec}} {{msg}}"),
                    _ => format!("{{prefix:>12}} {{wide_bar}} {{pos}}/{{len}} {unit} {{per_sec}} {{eta}} {{msg}}"),
                };
                // The template is ours; were it wrong, a plain bar shows the same numbers.
                let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = bars.add(ProgressBar::new(total).with_style(style).with_prefix(label.to_owned()));
                bar.enable_steady_tick(Duration::from_millis(250));
                TaskForm::Bar(bar)
            }
            Form::Lines { clock, write } => {
                let start_ns = clock.monotonic_ns();
                TaskForm::Lines { clock: *clock, write: *write, total, start_ns, last_ns: Cell::new(start_ns) }
            }
        };
        Task { form, label: label.to_owned() }
    }
}

impl Task<'_> {
    /// Shows where the task stands; `message` says how it goes.
    pub fn at(&self, done: u64, message: impl FnOnce() -> String) {
        match &self.form {
            TaskForm::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(message());
            }
            TaskForm::Lines { clock, write, total, start_ns, last_ns } => {
                let now_ns = clock.monotonic_ns();
                if now_ns.saturating_sub(last_ns.get()) < LINE_INTERVAL_NS {
                    return;
                }
                last_ns.set(now_ns);
                let elapsed_ns = now_ns - start_ns;
                let mut line = match total {
                    0 => format!("{}: {done}", self.label),
                    total => format!("{}: {done}/{total}", self.label),
                };
                if done > 0 && done < *total {
                    let left_ns = elapsed_ns as f64 / done as f64 * (total - done) as f64;
                    // Writing to a string cannot fail.
                    let _ = write!(line, ", {} left", units::duration_ns(left_ns as u64));
                }
                let message = message();
                if !message.is_empty() {
                    let _ = write!(line, ", {message}");
                }
                write(&line);
            }
        }
    }

    /// Starts where an earlier run left off, so that rates are those of this one.
    pub fn skip_to(&self, done: u64) {
        if let TaskForm::Bar(bar) = &self.form {
            bar.set_position(done);
            bar.reset_eta();
        }
    }

    /// Ends the task.
    pub fn finish(self) {
        if let TaskForm::Bar(bar) = &self.form {
            bar.finish_and_clear();
        }
    }
}

/// Shows a training run.
pub struct TrainingProgress<'a> {
    progress: &'a Progress<'a>,
    task: Task<'a>,
    waits: Option<Waits>,
}

impl<'a> TrainingProgress<'a> {
    /// A run of so many steps.
    pub fn new(progress: &'a Progress<'a>, steps: u64) -> TrainingProgress<'a> {
        TrainingProgress { progress, task: progress.task("train", steps, "steps"), waits: None }
    }

    /// Ends the display; answers what training waited for.
    pub fn finish(self) -> Option<Waits> {
        self.task.finish();
        self.waits
    }
}

impl Observer for TrainingProgress<'_> {
    fn observe(&mut self, event: &Event) {
        match event {
            Event::Built { untrained } => {
                for refusal in *untrained {
                    self.progress.note(&format!("train: {} stays as it is: {}", refusal.node, refusal.reason));
                }
            }
            Event::Resumed { step, checkpoint } => {
                self.task.skip_to(*step);
                self.progress.note(&format!("train: goes on after step {step} from checkpoint {}", checkpoint.short()));
            }
            Event::Unreadable { checkpoint, reason } => {
                let short = checkpoint.short();
                self.progress
                    .note(&format!("train: checkpoint {short} cannot be read ({reason}); an older one serves"));
            }
            Event::Stepped { step, loss, learning_rate, .. } => {
                self.task.at(*step, || format!("loss {loss:.4}, learning rate {learning_rate:.2e}"));
            }
            Event::Evaluated { step, metrics, is_best } => {
                let accuracy = metrics.accuracy.map(|a| format!(", accuracy {:.2} %", 100.0 * a)).unwrap_or_default();
                let best = if *is_best { ", best so far" } else { "" };
                self.progress.note(&format!("train: step {step}, validation loss {:.4}{accuracy}{best}", metrics.loss));
            }
            Event::Saved { .. } => {}
            Event::Waited { waits } => self.waits = Some(Waits::clone(waits)),
            Event::Stopped { step, evaluations } => {
                self.progress.note(&format!("train: stops at step {step}: no better for {evaluations} evaluations"));
            }
        }
    }
}
