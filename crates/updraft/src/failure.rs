//! The one place where errors become words, hints and exit codes.
//!
//! Inside, errors are precise; outside there are a few kinds, each of which tells the caller what to do.

use std::error::Error;
use std::fmt;
use std::path::Path;

use serde_json::{Value, json};
use updraft_compress::CompressError;
use updraft_data::DataError;
use updraft_engine::EngineError;
use updraft_graph::zoo::OptionsError;
use updraft_store::StoreError;
use updraft_train::TrainError;

use crate::context::Answer;
use crate::recipe::RecipeError;

/// Why a verb did not do what was asked.
#[derive(Debug)]
pub struct Failure {
    /// What the caller should do about it.
    pub kind: Kind,
    /// What happened, with the name of the thing that failed.
    pub message: String,
    /// What lies behind it, nearest first.
    pub causes: Vec<String>,
    /// What may help.
    pub hints: Vec<String>,
    /// What there is to say all the same: the work was done, files are written.
    pub answer: Option<Box<Answer>>,
}

/// What the caller should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ask differently: an argument or the recipe is wrong.
    Usage,
    /// Give other input: a model, data or a result file cannot be used.
    Input,
    /// Use another model or another form: this one is right but not supported.
    Unsupported,
    /// Change the training: the loss is no longer a number.
    Diverged,
    /// Mend the disk or the store, then ask again.
    Storage,
    /// Allow more, or take what there is: it was done, but what was asked for cannot be had.
    Limit,
}

impl Kind {
    /// The exit code of the process; 1 is left to panics and broken pipes.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::Input => 3,
            Kind::Unsupported => 4,
            Kind::Diverged => 5,
            Kind::Storage => 6,
            Kind::Limit => 7,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Usage => "usage",
            Kind::Input => "input",
            Kind::Unsupported => "unsupported",
            Kind::Diverged => "diverged",
            Kind::Storage => "storage",
            Kind::Limit => "limit",
        }
    }
}

impl Failure {
    /// A failure with nothing behind it.
    pub fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure { kind, message: message.into(), causes: Vec::new(), hints: Vec::new(), answer: None }
    }

    /// A failure whose message is the error's and whose causes are its sources.
    pub fn of(kind: Kind, error: &dyn Error) -> Failure {
        let mut causes = Vec::new();
        let mut source = error.source();
        let mut shown = error.to_string();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Errors that print their source in their own message would say it twice.
            if !shown.ends_with(&text) {
                causes.push(text.clone());
            }
            shown = text;
            source = cause.source();
        }
        Failure { causes, ..Failure::new(kind, error.to_string()) }
    }

    /// A file that could not be read or written.
    pub fn io(doing: &str, path: &Path, error: &std::io::Error) -> Failure {
        use std::io::ErrorKind as E;
        let kind = match (doing, error.kind()) {
            ("read", E::NotFound | E::IsADirectory | E::NotADirectory | E::InvalidData) => Kind::Input,
            _ => Kind::Storage,
        };
        Failure::new(kind, format!("cannot {doing} {}: {error}", path.display()))
    }

    /// The same failure with the name of the file it is about before the message.
    pub fn about(mut self, path: &Path) -> Failure {
        self.message = format!("{}: {}", path.display(), self.message);
        self
    }

    /// The same failure with one more hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hints.push(hint.into());
        self
    }

    /// The same failure of work that has an answer all the same.
    pub fn with_answer(mut self, answer: Answer) -> Failure {
        self.answer = Some(Box::new(answer));
        self
    }

    /// For programs: `{ "error": { kind, message, causes, hints } }`, beside the answer where there is one.
    pub fn json(&self) -> Value {
        let error = json!({
            "kind": self.kind.name(), "message": self.message, "causes": self.causes, "hints": self.hints,
        });
        let mut json = self.answer.as_ref().map_or_else(|| json!({}), |answer| answer.json.clone());
        json["error"] = error;
        json
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        for cause in &self.causes {
            write!(f, "\n  because: {cause}")?;
        }
        for hint in &self.hints {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        let kind = match &error {
            StoreError::NotFound { .. } => Kind::Input,
            StoreError::Name { .. } | StoreError::Url { .. } | StoreError::Setting { .. } => Kind::Usage,
            _ => Kind::Storage,
        };
        let failure = Failure::of(kind, &error);
        match &error {
            StoreError::Corrupt { .. } | StoreError::Malformed { .. } => failure
                .hint("the store was changed or damaged from outside; run with another `--store` to make it anew"),
            StoreError::Read { source, .. } | StoreError::Write { source, .. } if source.hint.is_some() => {
                source.hint.iter().fold(failure, |failure, hint| failure.hint(hint))
            }
            StoreError::Write { .. } => {
                failure.hint("nothing is half-written: once there is room, run the same command")
            }
            _ => failure,
        }
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Failure {
        match error {
            DataError::Store(error) => error.into(),
            DataError::Raced { .. } => Failure::of(Kind::Storage, &error),
            DataError::Server { .. } => Failure::of(Kind::Storage, &error)
                .hint("what was committed stays; once the server answers, the same command goes on from there"),
            error => Failure::of(Kind::Input, &error),
        }
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Failure {
        let kind = match &error {
            EngineError::Input { .. } => Kind::Input,
            EngineError::Threads { .. } => Kind::Usage,
            _ => Kind::Unsupported,
        };
        Failure::of(kind, &error)
    }
}

impl From<OptionsError> for Failure {
    fn from(error: OptionsError) -> Failure {
        Failure::of(Kind::Usage, &error)
    }
}

impl From<RecipeError> for Failure {
    fn from(error: RecipeError) -> Failure {
        Failure::of(Kind::Usage, &error)
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Failure {
        match error {
            TrainError::Store(error) => error.into(),
            TrainError::Data(error) => error.into(),
            TrainError::Engine(error) => error.into(),
            TrainError::Diverged { .. } => Failure::of(Kind::Diverged, &error).hint(
                "lower the learning rate, warm up longer, or clip gradients; then look at the samples named above",
            ),
            TrainError::Settings { .. } => Failure::of(Kind::Usage, &error),
            TrainError::Pipeline(_) | TrainError::Pass(_) => Failure::of(Kind::Unsupported, &error),
            _ => Failure::of(Kind::Input, &error),
        }
    }
}

impl From<CompressError> for Failure {
    fn from(error: CompressError) -> Failure {
        match error {
            CompressError::Store(error) => error.into(),
            CompressError::Data(error) => error.into(),
            CompressError::Engine(error) => error.into(),
            CompressError::Train(error) => (*error).into(),
            CompressError::Setting { .. } => Failure::of(Kind::Usage, &error),
            CompressError::NoSearchData => Failure::of(Kind::Usage, &error).hint(
                "give `[data.validation]` or `[data.test]`; `rows = [0.9, 1.0]` there and `rows = [0.0, 0.9]` in `[data.train]` \
                 divide one file",
            ),
            CompressError::TooFewSamples { .. } => {
                Failure::of(Kind::Input, &error).hint("give more data, or allow a larger drop")
            }
            CompressError::TimeLimit => Failure::of(Kind::Limit, &error)
                .hint("not even the original could be measured; give more time"),
            CompressError::Pass(_) | CompressError::Pipeline(_) => Failure::of(Kind::Unsupported, &error),
            _ => Failure::of(Kind::Input, &error),
        }
    }
}
