//! Steps between reading and writing: pictures in another size or as numbers, text as tokens.
//!
//! Steps work on columns in place, one after the other, row by row. What they need besides rows, such as a tokenizer's
//! file, is read once, when they are opened against the columns that they will see.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use updraft_graph::{DType, Tensor};

use super::Change;
use super::resize::resized;
use crate::config::{Colour, Decode, Filter, Resize, TokenOutput, Tokenize};
use crate::error::{DataError, known_names};
use crate::picture::{PIXELS_MAX, Picture, Sampling, Workspace};
use crate::rows::{Cells, Rows};
use crate::schema::{Kind, Schema};
use crate::tokenize::Tokenizer;

/// A step, as a recipe says it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Pictures in another size, encoded again: JPEG as JPEG of quality 90, everything else as PNG.
    Resize(ResizeStep),
    /// Pictures as numbers from 0 to 255 of shape [height, width, channels].
    Decode(DecodeStep),
    /// Text as token numbers.
    Tokenize(TokenizeStep),
}

/// The step `resize`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeStep {
    /// The columns.
    pub columns: Vec<String>,
    /// The size: `[height, width]` or `{ shorter = pixels }`.
    pub to: Resize,
}

/// The step `decode`. Pictures of another size than asked for are resized as they are decoded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecodeStep {
    /// The columns.
    pub columns: Vec<String>,
    /// The channels.
    pub colour: Colour,
    /// Height and width of every row.
    pub size: [usize; 2],
    /// How new pixels are made of old ones.
    #[serde(default)]
    pub filter: Filter,
}

/// The step `tokenize`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizeStep {
    /// The columns.
    pub columns: Vec<String>,
    /// The tokenizer and what becomes of its tokens; without it, a token a byte in lists of any length.
    #[serde(default = "bytes_as_tokens")]
    pub to: Tokenize,
}

fn bytes_as_tokens() -> Tokenize {
    Tokenize { file: None, length: None, pad: 0, output: TokenOutput::Ids, special_tokens: true }
}

/// The longest side of a picture that steps make.
const SIDE_MAX: usize = 16384;

/// Steps that know their columns.
pub struct Steps {
    schema: Arc<Schema>,
    /// By column, in the order of the steps.
    steps: Vec<(usize, Opened)>,
    identity: String,
}

#[derive(Clone)]
enum Opened {
    Resize(Resize),
    Decode(DecodeStep),
    Tokenize(Arc<Tokenizer>),
}

impl Steps {
    /// Steps on rows of these columns. Paths of files start at `base` where they are relative.
    ///
    /// # Errors
    /// A column that there is not or that holds something else, a tokenizer that cannot be read, a size that is none.
    pub fn open(steps: &[Step], columns: &Schema, base: &Path) -> Result<Steps, DataError> {
        let mut schema = columns.clone();
        let (mut opened, mut identity) = (Vec::new(), String::new());
        for step in steps {
            let (name, columns) = match step {
                Step::Resize(step) => ("resize", &step.columns),
                Step::Decode(step) => ("decode", &step.columns),
                Step::Tokenize(step) => ("tokenize", &step.columns),
            };
            let refused = |reason: String| DataError::Loader(format!("step `{name}`: {reason}"));
            // What it does, what it makes of a column where that is another kind, and what both depend on.
            let (does, makes, settings) = match step {
                Step::Resize(step) => {
                    check_size(step.to.size, step.to.shorter).map_err(refused)?;
                    (Opened::Resize(step.to.clone()), None, format!("{:?}", step.to))
                }
                Step::Decode(step) => {
                    check_size(Some(step.size), None).map_err(refused)?;
                    let [height, width] = step.size;
                    let pixels = Kind::Number { dtype: DType::U8, shape: vec![height, width, channels(step.colour)] };
                    let settings = format!("{:?} {:?} {:?}", step.colour, step.size, step.filter);
                    (Opened::Decode(step.clone()), Some(pixels), settings)
                }
                Step::Tokenize(step) => {
                    let tokenizer = Arc::new(Tokenizer::open(&step.to, base).map_err(refused)?);
                    let tokens = match step.to.length {
                        Some(length) => Kind::Number { dtype: DType::I64, shape: vec![length] },
                        None => Kind::List { dtype: DType::I64 },
                    };
                    // The file's content counts, wherever it lies.
                    let settings = Tokenize { file: None, ..step.to.clone() };
                    let settings = format!("{settings:?} {:?}", tokenizer.digest());
                    (Opened::Tokenize(tokenizer), Some(tokens), settings)
                }
            };
            for column in columns {
                let unknown = || refused(format!("no column `{column}`; {}", known_names(column, &schema.names())));
                let at = schema.index_of(column).ok_or_else(unknown)?;
                let held = &mut schema.columns[at].kind;
                let (takes, is_taken) = match does {
                    Opened::Tokenize(_) => ("text", matches!(held, Kind::Bytes | Kind::Text)),
                    Opened::Resize(_) | Opened::Decode(_) => ("pictures", *held == Kind::Bytes),
                };
                if !is_taken {
                    return Err(refused(format!("column `{column}` holds {held}, not {takes}")));
                }
                if let Some(makes) = &makes {
                    held.clone_from(makes);
                }
                opened.push((at, does.clone()));
                identity.push_str(&format!("{column} {settings}\n"));
            }
        }
        let schema = Arc::new(Schema::new(schema.columns).map_err(DataError::Loader)?);
        Ok(Steps { schema, steps: opened, identity: identity.trim_end().to_owned() })
    }
}

impl Change for Steps {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn apply(&self, rows: Rows, place: &dyn Fn(usize) -> String) -> Result<Rows, DataError> {
        if self.steps.is_empty() {
            return Ok(rows);
        }
        let mut columns = rows.columns;
        let mut workspace = Workspace::default();
        for (at, step) in &self.steps {
            let name = &self.schema.columns[*at].name;
            let Some(cells) = columns.get_mut(*at) else { continue };
            let failed = |row: usize, reason| DataError::Sample { sample: place(row), column: name.clone(), reason };
            let Cells::Bytes(given) = &*cells else {
                return Err(DataError::Loader(format!("column `{name}` holds neither pictures nor text")));
            };
            *cells = match step {
                Opened::Resize(to) => {
                    let mut made = Vec::with_capacity(given.len());
                    for (row, picture) in given.iter().enumerate() {
                        made.push(resized(picture, to, &mut workspace).map_err(|reason| failed(row, reason))?);
                    }
                    Cells::Bytes(made)
                }
                Opened::Decode(to) => decoded(given, to, &mut workspace).map_err(|(row, e)| failed(row, e))?,
                Opened::Tokenize(tokenizer) => {
                    tokenizer.apply(given).map_err(|(row, reason)| failed(row.unwrap_or(0), reason))?
                }
            };
        }
        Rows::new(self.schema.clone(), columns).map_err(DataError::Loader)
    }
}

fn check_size(size: Option<[usize; 2]>, shorter: Option<usize>) -> Result<(), String> {
    let sides: Vec<usize> = size.into_iter().flatten().chain(shorter).collect();
    if sides.is_empty() || sides.iter().any(|side| !(1..=SIDE_MAX).contains(side)) {
        return Err(format!("a size is `[height, width]` or `{{ shorter = pixels }}`, 1 to {SIDE_MAX} pixels each"));
    }
    Ok(())
}

fn channels(colour: Colour) -> usize {
    match colour {
        Colour::Grey => 1,
        Colour::Rgb => 3,
    }
}

/// The pixels of pictures as numbers; an error names the row.
fn decoded(given: &[Bytes], to: &DecodeStep, workspace: &mut Workspace) -> Result<Cells, (usize, String)> {
    let [height, width] = to.size;
    let shape = [given.len(), height, width, channels(to.colour)];
    let options = Decode { colour: to.colour, orient: true, pixels_max: PIXELS_MAX };
    let mut pixels = Vec::with_capacity(shape.iter().product());
    for (row, picture) in given.iter().enumerate() {
        let picture = Picture::decode(picture, &options, workspace);
        let picture = picture.and_then(|p| p.resized(to.size, Sampling::new(to.filter, true), workspace));
        let picture = picture.map_err(|reason| (row, reason))?;
        pixels.extend_from_slice(&picture.pixels);
        workspace.reclaim(picture);
    }
    let tensor = Tensor::from_bytes(DType::U8, &shape, &pixels);
    tensor.map(Cells::Numbers).map_err(|e| (0, e.to_string()))
}
