//! The part of a recipe that describes a dataset: plain data, checked when the dataset is opened.
//!
//! ```toml
//! [data.train]
//! path = "data/train.parquet"
//!
//! [[data.train.tensors]]
//! name = "image"
//! transform = [
//!   { decode = "grey" },
//!   { random_crop = { size = [28, 28], padding = 2 } },
//!   { normalize = { mean = [0.1307], std = [0.3081] } },
//! ]
//!
//! [[data.train.tensors]]
//! name = "label"
//! transform = [{ classes = 10 }]
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::source::shard::ShardFormat;

pub use crate::mixture::Weights;
pub use augment::{ColourJitter, GaussianBlur, Mix, RandAugment, RandomErasing, RandomResizedCrop};
pub use pictures::{Axis, Colour, Decode, Filter, RandomCrop, Resize};
pub use tokens::{TokenOutput, Tokenize};

mod augment;
mod pictures;
mod short;
mod tokens;

/// Where samples come from and which tensors they become.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetConfig {
    /// Where the data lies, relative to the recipe: a file, a pattern over files (`train-{000..127}.tar`, `**/*.parquet`),
    /// a folder with a manifest, with MDS's `index.json`, with files of one format or with pictures; or a URL (`s3://`,
    /// `gs://`, `az://`, `https://`) of any of these. Or give `sources`.
    #[serde(default, skip_serializing_if = "is_no_path")]
    pub path: PathBuf,
    /// The format; without it, what manifest, index or extensions say; a folder without any of them is `folder`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The part of the rows that is used, as fractions in the order of the source; without it, all. Text is cut by
    /// `span` instead, between characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<[f64; 2]>,
    /// Several sources instead of one, mixed by weight. What else is said holds for all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceConfig>,
    /// Other weights of the sources from some position on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<Weights>,
    /// The tensors of a batch, in this order; without any, every column as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorConfig>,
    /// Pairs of a batch made of each other; for training only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix: Option<Mix>,
    /// Conditions on columns; a sample is used where all hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filter: Vec<Condition>,
    /// Lays the one tensor, which holds lists of tokens, into rows of one length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pack: Option<PackConfig>,
    /// Lanes that an epoch is cut into: 48, 240 or another number with many divisors, of which the batch size is one or a
    /// multiple. With lanes the batches stay the same when ranks come and go; without, one process reads all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<u64>,
    /// Follows the dataset while others append to it: each row is used once, in the order of the shards, shuffled within
    /// windows of blocks; where rows are not there yet, they are waited for. Only for datasets with a manifest, without
    /// `rows`, `filter` and `pack`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follow: Option<Follow>,
    /// Whether the bytes of each shard are held against the digest that the manifest or MDS index has of them, before its
    /// first row is used. It reads every shard once more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub verify: bool,
    /// The most memory that samples may take: columns read ahead, decoded pictures kept, and, with a quarter of it, batches
    /// in the making. Default 1 GiB.
    #[serde(default = "default_memory_bytes")]
    pub memory_bytes: u64,
}

fn default_memory_bytes() -> u64 {
    1 << 30
}

fn is_no_path(path: &std::path::Path) -> bool {
    path.as_os_str().is_empty()
}

/// One of several sources.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// The file or folder, relative to the recipe.
    pub path: PathBuf,
    /// Its format, where the extension does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The part of its rows that is used, as fractions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<[f64; 2]>,
    /// Its share of the samples, in relation to the weights of the other sources.
    pub weight: f64,
}

/// How long a dataset that grows is waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Follow {
    /// After so many seconds in which nothing was appended, a batch that needs more is an error.
    pub wait_s: u64,
    /// Milliseconds between looks at the newest version.
    pub poll_ms: u64,
}

impl Default for Follow {
    /// An hour, looking every two seconds.
    fn default() -> Follow {
        Follow { wait_s: 3600, poll_ms: 2000 }
    }
}

/// A condition on a column; all that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// The column.
    pub column: String,
    /// The least number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<f64>,
    /// The largest number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<f64>,
    /// The allowed values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub one_of: Vec<Choice>,
    /// The least length: bytes of text, elements of lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub len_at_least: Option<u64>,
    /// The largest length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub len_at_most: Option<u64>,
}

/// An allowed value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum Choice {
    Number(f64),
    Text(String),
}

/// How documents become rows of one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackConfig {
    /// Tokens of a row.
    pub length: usize,
    /// What becomes of documents that do not fit.
    #[serde(default)]
    pub fill: Fill,
    /// A token after each document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<i64>,
    /// The token where a row has room left.
    #[serde(default)]
    pub padding: i64,
    /// Names a tensor of what follows each token in its document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<String>,
    /// The target where nothing follows.
    #[serde(default = "default_ignore")]
    pub ignore: i64,
    /// Names a tensor of the number of each token's document within its row, from 1; 0 is padding. Attention must not
    /// cross from one to another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<String>,
    /// Names a tensor of each token's place in its document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positions: Option<String>,
}

fn default_ignore() -> i64 {
    -100
}

impl Format {
    /// The format of the shards; `None` for text, which has none.
    pub fn shard_format(&self) -> Option<ShardFormat> {
        Some(match self {
            Format::Parquet => ShardFormat::Parquet,
            Format::Folder => ShardFormat::Folder,
            Format::Csv => ShardFormat::Csv,
            Format::Npy => ShardFormat::Npy,
            Format::Npz => ShardFormat::Npz,
            Format::Mds => ShardFormat::Mds,
            Format::Tar => ShardFormat::Tar,
            Format::Tfrecord => ShardFormat::TfRecord,
            Format::TfrecordRaw => ShardFormat::TfRecordRaw,
            Format::Arrow => ShardFormat::Arrow,
            Format::Jsonl => ShardFormat::JsonLines,
            Format::Text(_) => return None,
        })
    }
}

/// The format of a source, and its columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Format {
    /// Parquet. Columns are named by their path (`image`, `image.bytes`); lists must be of one length.
    Parquet,
    /// A folder with a folder of pictures for each class. Columns: `image` (bytes), `label` (`i64`, the classes in
    /// alphabetical order).
    Folder,
    /// Comma-separated values with a header. A column is `i64` if all its cells are whole numbers, `f64` if all are
    /// numbers, and text otherwise.
    Csv,
    /// One NumPy array, the samples along its first dimension. Column: `array`.
    Npy,
    /// Several NumPy arrays with equal first dimensions. Columns: their names.
    Npz,
    /// MosaicML Streaming's shards, listed by `index.json`. Columns: those of the index.
    Mds,
    /// WebDataset's archives: files that share a name up to the first dot are one sample. Columns: `__key__`, and the rest
    /// of each name (`jpg`, `cls`).
    Tar,
    /// TFRecord of `tf.train.Example`, compressed with gzip where the name ends with `.gz`. Columns: the features.
    Tfrecord,
    /// TFRecord of anything. Column: `record`.
    TfrecordRaw,
    /// Arrow IPC, file or stream.
    Arrow,
    /// One JSON object a line. Columns: its keys.
    Jsonl,
    /// Text, character by character. Columns: `inputs` and `targets`, both `i64` of `context` characters, the targets
    /// one character further on.
    Text(TextConfig),
}

/// How text becomes sequences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Characters of one sequence.
    pub context: usize,
    /// Characters from the start of one sequence to the start of the next; 1 (the default) gives every window.
    #[serde(default = "default_stride")]
    pub stride: usize,
    /// The part of the file that is used, as fractions of its characters; the vocabulary is always that of the whole
    /// file, so that training and validation parts agree on it.
    #[serde(default = "default_span")]
    pub span: [f64; 2],
}

fn default_stride() -> usize {
    1
}

fn default_span() -> [f64; 2] {
    [0.0, 1.0]
}

/// How documents are laid into rows of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fill {
    /// One after the other; what does not fit goes on in the next row. No room is lost.
    #[default]
    Cut,
    /// Whole, each in the fullest of the open rows that has room for it; the fullest row is given out when another is
    /// needed. Only documents longer than a row are cut.
    Whole {
        /// Rows kept open in each lane.
        open_rows: usize,
    },
}

/// One tensor of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorConfig {
    /// The name of the tensor, that of the model's input it feeds.
    pub name: String,
    /// The columns it is made of; several are laid side by side. Without any, the column of the tensor's name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// What is done to the column, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transform: Vec<Transform>,
}

/// One step from a column to a tensor. Those of the first group take pictures, in 8 bits a channel; `to_float` and
/// `normalize` end them, and a picture without either becomes a `u8` tensor. All pictures become channels × height ×
/// width.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Transform {
    /// JPEG, PNG or WebP bytes to pixels.
    Decode(Decode),
    /// To another size.
    Resize(Resize),
    /// The middle \[height, width\].
    Crop([usize; 2]),
    /// A window at random.
    RandomCrop(RandomCrop),
    /// A part of random area and shape, resized.
    RandomResizedCrop(RandomResizedCrop),
    /// Mirrored, or not, with equal chances.
    RandomFlip(Axis),
    /// Brightness, contrast, saturation and hue changed.
    ColourJitter(ColourJitter),
    /// In shades of grey with this chance; the channels stay three.
    RandomGrey(f32),
    /// Blurred.
    GaussianBlur(GaussianBlur),
    /// Some of 14 operations.
    RandAugment(RandAugment),
    /// A rectangle painted over.
    RandomErasing(RandomErasing),
    /// Pixels from 0..=255 to `f32` in 0..=1.
    ToFloat,

    /// To `f32`, less `mean`, divided by `std`: for pictures by channel, after scaling pixels to 0..=1; for numbers
    /// along the last dimension. One value serves all.
    Normalize(Normalize),

    /// To another element type, by its short name (`f32`).
    Cast(String),
    /// Class numbers, checked to lie in 0..n, as `i64`.
    Classes(u64),
    /// Class numbers, checked to lie in 0..n, as `f32` vectors of length n.
    OneHot(u64),
    /// Text to its place in this list, as `i64`.
    IndexOf(Vec<String>),
    /// Each sample to this shape.
    Reshape(Vec<usize>),
    /// Bytes as the numbers that they store, little-endian, of the element type with this short name; all samples of one
    /// length.
    Elements(String),
    /// Text to token numbers.
    Tokenize(Tokenize),
}

/// An affine map by channel or feature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalize {
    /// What is taken away.
    pub mean: Vec<f32>,
    /// What the difference is divided by.
    pub std: Vec<f32>,
}
