//! From cells to tensors: the configured steps, checked against the columns once and then applied to every batch.
//!
//! Randomness is a function of (seed, epoch, sample, step), so a sample looks the same whichever thread prepares it and
//! wherever a run was resumed.

use std::path::Path;

use bytes::Bytes;
use updraft_base::Digest;
use updraft_graph::{DType, Tensor};

use crate::config::{Normalize, TensorConfig, Transform};
use crate::error::known_names;
use crate::picture::PicturePlan;
use crate::source::Cells;
use crate::tokenize::Tokenizer;

/// The steps of one tensor.
pub(crate) enum Plan {
    Picture(PicturePlan),
    Numbers(Vec<NumberStep>),
}

pub(crate) enum NumberStep {
    Normalize(Normalize),
    Cast(DType),
    Classes(u64),
    OneHot(u64),
    IndexOf(Vec<String>),
    Reshape(Vec<usize>),
    Elements(DType),
    Tokenize(Tokenizer),
}

impl Plan {
    /// Checks the steps of a tensor against each other. Files that they name are found from `base`.
    pub(crate) fn new(config: &TensorConfig, base: &Path) -> Result<Plan, String> {
        match config.transform.split_first() {
            Some((Transform::Decode(decode), steps)) => {
                if config.columns.len() > 1 {
                    return Err("a picture is decoded from one column".into());
                }
                PicturePlan::new(decode, steps).map(Plan::Picture)
            }
            _ => {
                let steps = config.transform.iter().map(|t| NumberStep::new(t, base));
                steps.collect::<Result<_, _>>().map(Plan::Numbers)
            }
        }
    }

    /// Digests of the files that the steps are made of.
    pub(crate) fn digests(&self) -> Vec<Digest> {
        let Plan::Numbers(steps) = self else { return Vec::new() };
        let digest = |step: &NumberStep| match step {
            NumberStep::Tokenize(tokenizer) => tokenizer.digest(),
            _ => None,
        };
        steps.iter().filter_map(digest).collect()
    }
}

/// One value for each of `count`, from that many or from one.
pub(crate) fn spread(values: &[f32], count: usize, what: &str) -> Result<Vec<f32>, String> {
    match values {
        [one] => Ok(vec![*one; count]),
        _ if values.len() == count => Ok(values.to_vec()),
        _ => Err(format!("{} values of {what} for {count} channels or features", values.len())),
    }
}

impl NumberStep {
    fn new(transform: &Transform, base: &Path) -> Result<NumberStep, String> {
        Ok(match transform {
            Transform::Normalize(n) if n.std.contains(&0.0) => return Err("a std of 0 divides by zero".into()),
            Transform::Normalize(n) => NumberStep::Normalize(n.clone()),
            Transform::Cast(name) => NumberStep::Cast(element_type(name)?),
            Transform::Classes(count) => NumberStep::Classes(*count),
            Transform::OneHot(count) => NumberStep::OneHot(*count),
            Transform::IndexOf(words) => NumberStep::IndexOf(words.clone()),
            Transform::Reshape(shape) => NumberStep::Reshape(shape.clone()),
            Transform::Elements(name) => match element_type(name)? {
                dtype if dtype.bits() == Some(8 * dtype.size_in_memory()) && dtype != DType::Bool => {
                    NumberStep::Elements(dtype)
                }
                dtype => return Err(format!("bytes are not taken as elements of {dtype}")),
            },
            Transform::Tokenize(settings) => NumberStep::Tokenize(Tokenizer::open(settings, base)?),
            other => return Err(format!("{other:?} is for pictures; start with `decode`")),
        })
    }

    /// Applies the step to the cells of a batch. An error names the sample by its place in the batch, if it is one's.
    pub(crate) fn apply(&self, cells: Cells) -> Result<Cells, (Option<usize>, String)> {
        let whole = |reason: String| (None, reason);
        let tensor = match (self, cells) {
            (NumberStep::IndexOf(words), Cells::Bytes(cells)) => return index_of(words, &cells),
            (NumberStep::Tokenize(tokenizer), Cells::Bytes(cells)) => return tokenizer.apply(&cells),
            (NumberStep::Elements(dtype), Cells::Bytes(cells)) => return elements(*dtype, &cells),
            (_, Cells::Bytes(_)) => {
                return Err(whole("holds text or bytes, which become no tensor without `decode`, `index_of`, `tokenize` or `elements`".into()));
            }
            (_, Cells::Lists(_)) => return Err((None, "lists of different lengths are no tensor".into())),
            (NumberStep::IndexOf(_) | NumberStep::Tokenize(_) | NumberStep::Elements(_), Cells::Numbers(_)) => {
                return Err(whole(
                    "`index_of`, `tokenize` and `elements` are for text and bytes, and this is a number".into(),
                ));
            }
            (_, Cells::Numbers(tensor)) => tensor,
        };
        let refused = |e: updraft_graph::TensorError| (None, e.to_string());
        Ok(Cells::Numbers(match self {
            NumberStep::IndexOf(_) | NumberStep::Tokenize(_) | NumberStep::Elements(_) => tensor,
            NumberStep::Cast(dtype) => tensor.cast(*dtype).map_err(refused)?,
            NumberStep::Reshape(shape) => {
                let batch = [&tensor.shape()[..1], shape].concat();
                tensor.reshaped(&batch).map_err(refused)?
            }
            NumberStep::Normalize(Normalize { mean, std }) => {
                let mut floats = tensor.cast(DType::F32).map_err(refused)?;
                let features = if floats.rank() > 1 { floats.shape()[floats.rank() - 1] } else { 1 };
                let (mean, std) =
                    (spread(mean, features, "mean").map_err(whole)?, spread(std, features, "std").map_err(whole)?);
                for (i, value) in floats.as_mut_slice::<f32>().map_err(refused)?.iter_mut().enumerate() {
                    *value = (*value - mean[i % features]) / std[i % features];
                }
                floats
            }
            NumberStep::Classes(count) => {
                let classes = classes(&tensor, *count)?;
                Tensor::new(tensor.shape(), &classes).map_err(refused)?
            }
            NumberStep::OneHot(count) => {
                let classes = classes(&tensor, *count)?;
                let shape = [tensor.shape(), &[*count as usize]].concat();
                let mut vectors = Tensor::zeros(DType::F32, &shape).map_err(refused)?;
                let floats = vectors.as_mut_slice::<f32>().map_err(refused)?;
                for (i, class) in classes.iter().enumerate() {
                    floats[i * *count as usize + *class as usize] = 1.0;
                }
                vectors
            }
        }))
    }
}

fn element_type(name: &str) -> Result<DType, String> {
    DType::from_name(name).ok_or_else(|| {
        let names: Vec<String> = DType::ALL.iter().map(|d| d.name().to_owned()).collect();
        format!("`{name}` is not an element type; {}", known_names(name, &names))
    })
}

/// Bytes of equal lengths as numbers, `[samples, numbers of each]`.
fn elements(dtype: DType, cells: &[Bytes]) -> Result<Cells, (Option<usize>, String)> {
    let len = cells.first().map_or(0, Bytes::len);
    let size = dtype.size_in_memory();
    if !len.is_multiple_of(size) {
        return Err((Some(0), format!("{len} bytes are no whole number of {dtype}")));
    }
    if let Some(at) = cells.iter().position(|cell| cell.len() != len) {
        return Err((Some(at), format!("holds {} bytes and the others of its batch {len}", cells[at].len())));
    }
    let refused = |e: updraft_graph::TensorError| (None, e.to_string());
    let mut tensor = Tensor::zeros(dtype, &[cells.len(), len / size]).map_err(refused)?;
    if len > 0 {
        let rows = tensor.bytes_mut().chunks_exact_mut(len);
        rows.zip(cells).for_each(|(row, cell)| row.copy_from_slice(cell));
    }
    Ok(Cells::Numbers(tensor))
}

/// Class numbers within 0..count.
fn classes(tensor: &Tensor, count: u64) -> Result<Vec<i64>, (Option<usize>, String)> {
    let per_sample = (tensor.len() / tensor.shape()[0].max(1)).max(1);
    let values =
        tensor.to_i128().map_err(|_| (None, format!("holds {}, and class numbers are integers", tensor.dtype())))?;
    let mut classes = Vec::with_capacity(values.len());
    for (i, value) in values.iter().enumerate() {
        match i64::try_from(*value) {
            Ok(class) if class >= 0 && (class as u64) < count => classes.push(class),
            _ => return Err((Some(i / per_sample), format!("class {value} is not in 0..{count}"))),
        }
    }
    Ok(classes)
}

fn index_of(words: &[String], cells: &[Bytes]) -> Result<Cells, (Option<usize>, String)> {
    let mut indices = Vec::with_capacity(cells.len());
    for (i, cell) in cells.iter().enumerate() {
        let found = words.iter().position(|w| w.as_bytes() == cell.as_ref());
        indices.push(found.ok_or_else(|| {
            let text = String::from_utf8_lossy(cell);
            (Some(i), format!("`{text:.100}` is not in the list; {}", known_names(&text, words)))
        })? as i64);
    }
    Ok(Cells::Numbers(Tensor::vector(&indices)))
}
