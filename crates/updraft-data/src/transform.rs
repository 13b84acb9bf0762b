//! From cells to tensors: the configured steps, checked against the columns once and then applied to every batch.
//!
//! Randomness is a function of (seed, epoch, sample, step), so a sample looks the same whichever thread prepares it and
//! wherever a run was resumed.

use bytes::Bytes;
use updraft_base::Key;
use updraft_graph::{DType, Tensor};

use crate::config::{Axis, Colour, Normalize, RandomCrop, TensorConfig, Transform};
use crate::error::known_names;
use crate::picture::Picture;
use crate::source::Cells;

/// The steps of one tensor.
pub(crate) enum Plan {
    Picture(PicturePlan),
    Numbers(Vec<NumberStep>),
}

/// Decoding, moving pixels, and how they end.
pub(crate) struct PicturePlan {
    colour: Colour,
    steps: Vec<PictureStep>,
    /// How many of the steps come before the first random one. Their result is worth keeping.
    fixed: usize,
    finish: Finish,
}

enum PictureStep {
    Resize([usize; 2]),
    Crop([usize; 2]),
    RandomCrop(RandomCrop),
    RandomFlip(Axis),
}

enum Finish {
    Bytes,
    /// For each channel, the number that each of the 256 values becomes.
    Floats(Vec<[f32; 256]>),
}

pub(crate) enum NumberStep {
    Normalize(Normalize),
    Cast(DType),
    Classes(u64),
    OneHot(u64),
    IndexOf(Vec<String>),
    Reshape(Vec<usize>),
}

impl Plan {
    /// Checks the steps of a tensor against each other.
    pub(crate) fn new(config: &TensorConfig) -> Result<Plan, String> {
        match config.transform.split_first() {
            Some((Transform::Decode(colour), steps)) => {
                if config.columns.len() > 1 {
                    return Err("a picture is decoded from one column".into());
                }
                PicturePlan::new(*colour, steps).map(Plan::Picture)
            }
            _ => config.transform.iter().map(NumberStep::new).collect::<Result<_, _>>().map(Plan::Numbers),
        }
    }
}

impl PicturePlan {
    fn new(colour: Colour, transforms: &[Transform]) -> Result<PicturePlan, String> {
        let channels = match colour {
            Colour::Grey => 1,
            Colour::Rgb => 3,
        };
        let mut steps = Vec::new();
        let mut finish = None;
        for transform in transforms {
            if finish.is_some() {
                return Err(format!("{transform:?} comes after the pixels became floats"));
            }
            match transform {
                Transform::Resize(size) => steps.push(PictureStep::Resize(some_pixels(*size)?)),
                Transform::Crop(size) => steps.push(PictureStep::Crop(some_pixels(*size)?)),
                Transform::RandomCrop(crop) => {
                    some_pixels(crop.size)?;
                    // Twice the padding is added to a side, which must not overflow.
                    some_pixels([crop.padding.max(1); 2])?;
                    steps.push(PictureStep::RandomCrop(crop.clone()));
                }
                Transform::RandomFlip(axis) => steps.push(PictureStep::RandomFlip(*axis)),
                Transform::ToFloat => finish = Some(Finish::floats(channels, &[0.0], &[1.0])?),
                Transform::Normalize(n) => finish = Some(Finish::floats(channels, &n.mean, &n.std)?),
                other => return Err(format!("{other:?} is for numbers, and this is a picture")),
            }
        }
        let is_random = |s: &PictureStep| matches!(s, PictureStep::RandomCrop(_) | PictureStep::RandomFlip(_));
        let fixed = steps.iter().position(is_random).unwrap_or(steps.len());
        Ok(PicturePlan { colour, steps, fixed, finish: finish.unwrap_or(Finish::Bytes) })
    }

    pub(crate) fn dtype(&self) -> DType {
        match self.finish {
            Finish::Bytes => DType::U8,
            Finish::Floats(_) => DType::F32,
        }
    }

    /// Decodes and applies the steps before the first random one.
    pub(crate) fn prepare(&self, bytes: &[u8]) -> Result<Picture, String> {
        let mut picture = Picture::decode(bytes, self.colour)?;
        for step in &self.steps[..self.fixed] {
            match step {
                PictureStep::Resize(size) => picture = picture.resized(*size)?,
                PictureStep::Crop(size) => {
                    picture = picture.window(picture.place(*size, 0, |room| room / 2)?, *size);
                }
                PictureStep::RandomCrop(_) | PictureStep::RandomFlip(_) => {}
            }
        }
        Ok(picture)
    }

    /// Applies the steps from the first random one on. `key` belongs to this tensor of this sample in this epoch.
    pub(crate) fn vary(&self, mut picture: Picture, key: &Key) -> Result<Picture, String> {
        for (index, step) in self.steps.iter().enumerate().skip(self.fixed) {
            let key = key.child_index(index as u64);
            match step {
                PictureStep::Resize(size) => picture = picture.resized(*size)?,
                PictureStep::Crop(size) => {
                    picture = picture.window(picture.place(*size, 0, |room| room / 2)?, *size);
                }
                PictureStep::RandomCrop(RandomCrop { size, padding }) => {
                    let mut counter = 0;
                    let at = picture.place(*size, *padding, |room| {
                        counter += 1;
                        key.below(counter, room + 1)
                    })?;
                    picture = picture.window(at, *size);
                }
                PictureStep::RandomFlip(axis) => {
                    if key.bits(0) & 1 == 1 {
                        picture.flip(*axis);
                    }
                }
            }
        }
        Ok(picture)
    }

    pub(crate) fn is_random(&self) -> bool {
        self.fixed < self.steps.len()
    }

    /// Writes the picture, channels first, as the elements of [`dtype`](Self::dtype).
    pub(crate) fn write(&self, picture: &Picture, out: &mut [u8]) {
        let area = picture.height * picture.width;
        for channel in 0..picture.channels {
            let pixels = picture.pixels[channel..].iter().step_by(picture.channels);
            match &self.finish {
                Finish::Bytes => out[channel * area..].iter_mut().zip(pixels).for_each(|(o, p)| *o = *p),
                Finish::Floats(tables) => {
                    let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut out[4 * channel * area..]);
                    let table = &tables[channel];
                    floats.iter_mut().zip(pixels).for_each(|(o, p)| *o = table[usize::from(*p)]);
                }
            }
        }
    }
}

impl Picture {
    /// The top left corner of a window of `size` in the picture with `padding` around it; `choose` picks within the room.
    fn place(
        &self,
        [height, width]: [usize; 2],
        padding: usize,
        mut choose: impl FnMut(u64) -> u64,
    ) -> Result<[isize; 2], String> {
        let mut start = |side: usize, window: usize| {
            let room = (side + 2 * padding).checked_sub(window)?;
            Some(choose(room as u64) as isize - padding as isize)
        };
        match (start(self.height, height), start(self.width, width)) {
            (Some(top), Some(left)) => Ok([top, left]),
            _ => Err(format!(
                "a window of {height} x {width} does not fit a picture of {} x {} with padding {padding}",
                self.height, self.width
            )),
        }
    }
}

fn some_pixels(size: [usize; 2]) -> Result<[usize; 2], String> {
    const SIDE_MAX: usize = 1 << 16;
    if size.iter().all(|side| (1..=SIDE_MAX).contains(side)) {
        Ok(size)
    } else {
        Err(format!("{} x {} pixels: sides are 1 to {SIDE_MAX}", size[0], size[1]))
    }
}

impl Finish {
    fn floats(channels: usize, mean: &[f32], std: &[f32]) -> Result<Finish, String> {
        let (mean, std) = (spread(mean, channels, "mean")?, spread(std, channels, "std")?);
        if std.contains(&0.0) {
            return Err("a std of 0 divides by zero".into());
        }
        let table = |(mean, std): (&f32, &f32)| std::array::from_fn(|value| (value as f32 / 255.0 - mean) / std);
        Ok(Finish::Floats(mean.iter().zip(&std).map(table).collect()))
    }
}

/// One value for each of `count`, from that many or from one.
fn spread(values: &[f32], count: usize, what: &str) -> Result<Vec<f32>, String> {
    match values {
        [one] => Ok(vec![*one; count]),
        _ if values.len() == count => Ok(values.to_vec()),
        _ => Err(format!("{} values of {what} for {count} channels or features", values.len())),
    }
}

impl NumberStep {
    fn new(transform: &Transform) -> Result<NumberStep, String> {
        Ok(match transform {
            Transform::Normalize(n) if n.std.contains(&0.0) => return Err("a std of 0 divides by zero".into()),
            Transform::Normalize(n) => NumberStep::Normalize(n.clone()),
            Transform::Cast(name) => NumberStep::Cast(DType::from_name(name).ok_or_else(|| {
                let names: Vec<String> = DType::ALL.iter().map(|d| d.name().to_owned()).collect();
                format!("`{name}` is not an element type; {}", known_names(name, &names))
            })?),
            Transform::Classes(count) => NumberStep::Classes(*count),
            Transform::OneHot(count) => NumberStep::OneHot(*count),
            Transform::IndexOf(words) => NumberStep::IndexOf(words.clone()),
            Transform::Reshape(shape) => NumberStep::Reshape(shape.clone()),
            other => return Err(format!("{other:?} is for pictures; start with `decode`")),
        })
    }

    /// Applies the step to the cells of a batch. An error names the sample by its place in the batch, if it is one's.
    pub(crate) fn apply(&self, cells: Cells) -> Result<Cells, (Option<usize>, String)> {
        let whole = |reason: String| (None, reason);
        let tensor = match (self, cells) {
            (NumberStep::IndexOf(words), Cells::Bytes(cells)) => return index_of(words, &cells),
            (_, Cells::Bytes(_)) => {
                return Err(whole("holds text or bytes, which become no tensor without `decode` or `index_of`".into()));
            }
            (_, Cells::Lists(_)) => return Err((None, "lists of different lengths are no tensor".into())),
            (NumberStep::IndexOf(_), Cells::Numbers(_)) => {
                return Err(whole("`index_of` is for text, and this is a number".into()));
            }
            (_, Cells::Numbers(tensor)) => tensor,
        };
        let refused = |e: updraft_graph::TensorError| (None, e.to_string());
        Ok(Cells::Numbers(match self {
            NumberStep::IndexOf(_) => tensor,
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
