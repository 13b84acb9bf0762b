//! A dataset: a source, and the tensors that its columns become.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use updraft_base::{Digest, Hasher, Key};
use updraft_graph::{DType, Tensor};

use crate::augment;
use crate::config::{DatasetConfig, Mix, PackConfig, TensorConfig};
use crate::error::{DataError, known_names};
use crate::filter::Filter;
use crate::mixture::Weights;
use crate::picture::Workspace;
use crate::source::place::is_url;
use crate::source::{self, Access, Cells, Source};
use crate::stall::{Stage, Stopwatch};
use crate::text::Vocabulary;
use crate::transform::Plan;

mod memory;
mod pack;
mod pictures;

use memory::queue_share;
use pictures::PictureCache;

/// Samples, numbered from 0, each a few tensors.
pub struct Dataset {
    path: std::path::PathBuf,
    source: Box<dyn Source>,
    columns: Vec<String>,
    tensors: Vec<PlannedTensor>,
    /// With the places of the tensors of pictures and of labels.
    mix: Option<(Mix, [usize; 2])>,
    facts: DatasetFacts,
    memory_bytes: u64,
    /// The blocks of each source of a mixture; one range where there is one source.
    source_blocks: Vec<Range<usize>>,
    /// The sources' weights, where there are several.
    weights: Vec<Weights>,
    /// With the places of its columns among the source's.
    filter: Option<(Filter, Vec<usize>)>,
    pack: Option<PackConfig>,
    lanes: Option<u64>,
    is_followed: bool,
}

/// What is known about a dataset; kept as part of what a model came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DatasetFacts {
    /// The digest of the content of the source. Its path is not part of it.
    pub digest: Digest,
    /// The digest of how tensors are made of the content.
    pub pipeline: Digest,
    /// The number of samples.
    pub samples: u64,
    /// The tensors of a sample, in the order of the configuration.
    pub tensors: Vec<TensorFacts>,
    /// The characters that the numbers in a text dataset stand for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<Vocabulary>,
    /// The names of the classes, where the source has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<Vec<String>>,
}

/// One tensor of a sample.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorFacts {
    /// Its name.
    pub name: String,
    /// Its element type.
    #[serde(serialize_with = "dtype_name")]
    pub dtype: DType,
    /// Its shape, without the batch dimension.
    pub shape: Vec<usize>,
}

fn dtype_name<S: serde::Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}

struct PlannedTensor {
    name: String,
    /// Indices among the source's columns.
    columns: Vec<usize>,
    plan: Plan,
    cache: PictureCache,
    /// What the largest cell so far took.
    cell_bytes_max: AtomicU64,
    /// Batches that were used and given back.
    spare: Mutex<Vec<Tensor>>,
    /// Memory for pictures that no thread uses now.
    workspaces: Mutex<Vec<Workspace>>,
}

/// As many batches as two threads have in the making and a consumer in use.
const SPARE_MAX: usize = 4;

impl PlannedTensor {
    /// How many of so many cells take so much memory together, as far as the largest so far tells; at least one.
    fn cells_in(&self, bytes: u64, cells: usize) -> usize {
        let together = bytes.checked_div(self.cell_bytes_max());
        together.map_or(1, |n| usize::try_from(n).unwrap_or(usize::MAX)).clamp(1, cells.max(1))
    }

    fn cell_bytes_max(&self) -> u64 {
        self.cell_bytes_max.load(Ordering::Relaxed)
    }

    fn saw_cell_of(&self, bytes: u64) {
        self.cell_bytes_max.fetch_max(bytes, Ordering::Relaxed);
    }

    fn take_spare(&self, dtype: DType, shape: &[usize]) -> Option<Tensor> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        (spare.dtype() == dtype && spare.shape() == shape).then_some(spare)
    }

    fn take_workspace(&self) -> Workspace {
        self.workspaces.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_workspace(&self, workspace: Workspace) {
        self.workspaces.lock().unwrap_or_else(PoisonError::into_inner).push(workspace);
    }
}

impl Dataset {
    /// Opens the source and makes the tensors of its first sample, so that a mistake in the configuration shows now. A
    /// relative path starts at `base`, the folder of the recipe.
    pub fn open(config: &DatasetConfig, base: &Path) -> Result<Dataset, DataError> {
        Dataset::open_with(config, base, &Access::default())
    }

    /// The same, with what is needed to reach the stores that its path leads to.
    pub fn open_with(config: &DatasetConfig, base: &Path, access: &Access) -> Result<Dataset, DataError> {
        if config.follow.is_some()
            && let Some((field, _)) = [
                ("sources", !config.sources.is_empty()),
                ("rows", config.rows.is_some()),
                ("filter", !config.filter.is_empty()),
                ("pack", config.pack.is_some()),
            ]
            .into_iter()
            .find(|(_, is_given)| *is_given)
        {
            return Err(DataError::Loader(format!("`follow` and `{field}` exclude each other")));
        }
        let path = if is_url(&config.path.to_string_lossy()) { config.path.clone() } else { base.join(&config.path) };
        let for_samples =
            DatasetConfig { memory_bytes: config.memory_bytes - queue_share(config.memory_bytes), ..config.clone() };
        let (opened, blocks) = match (config.sources.is_empty(), config.path.as_os_str().is_empty()) {
            (true, true) => return Err(DataError::Loader("a dataset needs `path` or `sources`".into())),
            (false, false) => return Err(DataError::Loader("`path` and `sources` exclude each other".into())),
            (false, true) => source::open_all(&for_samples, base, access)?,
            (true, false) => {
                let opened = source::open(&for_samples, base, access)?;
                let blocks = vec![opened.source.block_rows().len()];
                (opened, blocks)
            }
        };
        Dataset::over(config, base, path, opened, &blocks)
    }

    /// A dataset over an open source, or several joined, each with so many blocks; files of transforms are found from
    /// `base`.
    pub(crate) fn over(
        config: &DatasetConfig,
        base: &Path,
        path: PathBuf,
        opened: source::Opened,
        blocks: &[usize],
    ) -> Result<Dataset, DataError> {
        let configured = if config.tensors.is_empty() {
            let plain = |name: &String| TensorConfig { name: name.clone(), columns: Vec::new(), transform: Vec::new() };
            opened.columns.iter().map(plain).collect()
        } else {
            config.tensors.clone()
        };
        let mut tensors: Vec<PlannedTensor> = Vec::with_capacity(configured.len());
        for tensor in &configured {
            let name = &tensor.name;
            if tensors.iter().any(|t| t.name == *name) {
                return Err(DataError::tensor(name, "two tensors have this name"));
            }
            let plan = Plan::new(tensor, base).map_err(|reason| DataError::tensor(name, reason))?;
            let names = if tensor.columns.is_empty() { std::slice::from_ref(name) } else { &tensor.columns };
            let columns = names.iter().filter_map(|n| opened.columns.iter().position(|c| c == n)).collect();
            tensors.push(PlannedTensor {
                name: name.clone(),
                columns,
                plan,
                cache: PictureCache::default(),
                cell_bytes_max: AtomicU64::new(0),
                spare: Mutex::default(),
                workspaces: Mutex::default(),
            });
        }
        let mix =
            config.mix.clone().map(|mix| mixed_tensors(&mix, &configured).map(|places| (mix, places))).transpose()?;
        let facts = DatasetFacts {
            digest: opened.digest,
            pipeline: pipeline_digest(config, &configured, &tensors)
                .map_err(|e| DataError::file(&path, e.to_string()))?,
            samples: opened.source.block_rows().iter().sum(),
            tensors: Vec::new(),
            vocabulary: opened.vocabulary,
            classes: opened.classes,
        };
        let mut first_block = 0;
        let source_blocks = blocks.iter().map(|count| {
            first_block += count;
            first_block - count..first_block
        });
        let mut dataset = Dataset {
            source_blocks: source_blocks.collect(),
            weights: weights(config),
            filter: filter(config, &opened.columns, &path)?,
            pack: config.pack.clone(),
            lanes: config.lanes,
            is_followed: config.follow.is_some(),
            path,
            source: opened.source,
            columns: opened.columns,
            tensors,
            mix,
            facts,
            memory_bytes: config.memory_bytes,
        };
        dataset.learn_from_first_sample()?;
        Ok(dataset)
    }

    /// Finds the shapes of the tensors, and room for decoded pictures in the memory that the source leaves.
    fn learn_from_first_sample(&mut self) -> Result<(), DataError> {
        let mut watch = Stopwatch::start(None);
        let first = match &self.pack {
            Some(pack) => {
                pack::check(pack, self.tensors.len()).map_err(DataError::Loader)?;
                self.weigh(&[0], &mut watch)?;
                self.packed(pack, &[Vec::new()], &mut watch)?
            }
            None => self.tensors_of(&[0], &[0], &Key::new(0), true, &mut watch)?,
        };
        self.facts.tensors = first
            .iter()
            .map(|(name, t)| TensorFacts { name: name.clone(), dtype: t.dtype(), shape: t.shape()[1..].to_vec() })
            .collect();
        let taken_bytes = self.source.resident_bytes(u64::MAX).saturating_add(self.queue_bytes());
        let free_bytes = self.memory_bytes.saturating_sub(taken_bytes);
        let pictures = self.tensors.iter().filter(|t| matches!(t.plan, Plan::Picture(_))).count() as u64;
        for tensor in &mut self.tensors {
            if let Plan::Picture(plan) = &tensor.plan {
                let cells = self.source.read(&tensor.columns[..1], &[0])?.pop();
                let Some(Cells::Bytes(cells)) = cells else { continue };
                let sample = plan
                    .prepare(&cells[0], &mut Workspace::default())
                    .map_err(|reason| DataError::tensor(&tensor.name, reason))?;
                tensor.cache = PictureCache::new(free_bytes / pictures, &sample, self.facts.samples);
            }
        }
        Ok(())
    }

    /// The number of samples.
    pub fn len(&self) -> u64 {
        self.facts.samples
    }

    /// Whether there are no samples; never so for a dataset that could be opened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is known about it.
    pub fn facts(&self) -> &DatasetFacts {
        &self.facts
    }

    /// Where a sample comes from, for messages: file and row.
    pub fn sample_name(&self, sample: u64) -> String {
        self.source.row_name(sample)
    }

    /// The named tensors of some samples, stacked along a new first dimension. Random transforms draw from `key` and
    /// what each row is numbered by. Where a sample `comes_again`, its decoded picture is worth keeping.
    pub(crate) fn tensors_of(
        &self,
        samples: &[u64],
        numbers: &[u64],
        key: &Key,
        comes_again: bool,
        watch: &mut Stopwatch,
    ) -> Result<Vec<(String, Tensor)>, DataError> {
        let mut out = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            let made = match &tensor.plan {
                Plan::Picture(plan) => {
                    let keys = key.child(&tensor.name);
                    let keys: Vec<Key> = numbers.iter().map(|number| keys.child_index(*number)).collect();
                    self.pictures(tensor, plan, samples, &keys, comes_again, watch)?
                }
                Plan::Numbers(_) => self.numbers(tensor, samples, watch)?,
            };
            out.push((tensor.name.clone(), made));
        }
        if let Some((mix, [pictures, labels])) = &self.mix {
            let refused = |reason| DataError::tensor(&mix.pictures, reason);
            let [pictures, labels] = out.get_disjoint_mut([*pictures, *labels]).map_err(|e| refused(e.to_string()))?;
            augment::mix(mix, numbers, &mut pictures.1, &mut labels.1, &key.child("mix")).map_err(refused)?;
        }
        Ok(out)
    }

    /// Takes back the memory of a batch that nobody uses any more, for one of the next.
    pub(crate) fn reuse(&self, tensors: Vec<(String, Tensor)>) {
        for (name, memory) in tensors {
            let pictures = self.tensors.iter().find(|t| t.name == name && matches!(t.plan, Plan::Picture(_)));
            if let Some(tensor) = pictures {
                let mut spare = tensor.spare.lock().unwrap_or_else(PoisonError::into_inner);
                if spare.len() < SPARE_MAX {
                    spare.push(memory);
                }
            }
        }
    }

    pub(crate) fn block_samples(&self) -> &[u64] {
        self.source.block_rows()
    }

    /// The samples of the blocks of each source of a mixture.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &[u64]> {
        self.source_blocks.iter().map(|blocks| &self.source.block_rows()[blocks.clone()])
    }

    /// The weights that sources are mixed by; none where there is one source.
    pub(crate) fn weights(&self) -> &[Weights] {
        &self.weights
    }

    /// Lanes that the configuration asks for.
    pub fn lanes(&self) -> Option<u64> {
        self.lanes
    }

    /// Whether it grows while it is read.
    pub fn is_followed(&self) -> bool {
        self.is_followed
    }

    /// What the source has grown to, once it has this many blocks; they are waited for unless it `is_stopped`.
    pub(crate) fn grown(&self, blocks: usize, is_stopped: &dyn Fn() -> bool) -> Result<Arc<[u64]>, DataError> {
        self.source.grown(blocks, is_stopped)
    }

    /// The digest of all that has samples before this one, where it grows.
    pub(crate) fn digest_until(&self, sample: u64) -> Option<Digest> {
        self.source.digest_until(sample)
    }

    /// Tells the source which blocks steps to come need.
    pub(crate) fn foresee(&self, uses: &mut dyn Iterator<Item = (usize, Range<u64>)>) {
        self.source.foresee(uses);
    }

    /// Tells the source that all steps before this one are done.
    pub(crate) fn advance(&self, step: u64) {
        self.source.advance(step);
    }

    /// Whether neighbouring samples of a batch are mixed with each other, so that whoever makes one needs both.
    pub(crate) fn pairs_samples(&self) -> bool {
        self.mix.is_some()
    }

    /// How rows are packed, where they are.
    pub(crate) fn pack(&self) -> Option<&PackConfig> {
        self.pack.as_ref()
    }

    /// Whether samples are left out or joined, so that nobody knows the samples of a batch without reading those before.
    pub(crate) fn is_many_to_one(&self) -> bool {
        self.filter.is_some() || self.pack.is_some()
    }

    /// Lists that all are of one length, as the rows of a tensor.
    fn stacked(&self, tensor: &PlannedTensor, lists: &[Tensor], samples: &[u64]) -> Result<Tensor, DataError> {
        let refused = |reason: String| DataError::tensor(&tensor.name, reason);
        let Plan::Numbers(steps) = &tensor.plan else { return Err(refused("pictures are not numbers".into())) };
        let Some(first) = lists.first() else { return Err(refused("a batch of no samples".into())) };
        let known = self.facts.tensors.iter().find(|t| t.name == tensor.name && steps.is_empty());
        let length = known.and_then(|t| t.shape.first().copied()).unwrap_or(first.len());
        if let Some(at) = lists.iter().position(|list| list.len() != length) {
            return Err(DataError::Sample {
                sample: self.source.row_name(samples[at]),
                column: self.columns[tensor.columns[0]].clone(),
                reason: format!(
                    "holds lists of different lengths: {} here, {length} in others; pack them, or write them of one length",
                    lists[at].len()
                ),
            });
        }
        let bytes: Vec<u8> = lists.iter().flat_map(|list| list.bytes().iter().copied()).collect();
        Tensor::from_bytes(first.dtype(), &[lists.len(), length], &bytes).map_err(|e| refused(e.to_string()))
    }

    fn numbers(&self, tensor: &PlannedTensor, samples: &[u64], watch: &mut Stopwatch) -> Result<Tensor, DataError> {
        let refused = |reason: &str| Err(DataError::tensor(&tensor.name, reason));
        match self.cells(tensor, samples, watch)? {
            Cells::Numbers(tensor) => Ok(tensor),
            Cells::Lists(_) => refused("holds lists, which become no tensor by themselves; pack them"),
            Cells::Bytes(_) => refused(
                "holds text or bytes, which become no tensor without `decode`, `index_of`, `tokenize` or `elements`",
            ),
        }
    }

    /// The cells of a tensor after all its steps.
    fn cells(&self, tensor: &PlannedTensor, samples: &[u64], watch: &mut Stopwatch) -> Result<Cells, DataError> {
        let refused = |reason: String| DataError::tensor(&tensor.name, reason);
        let Plan::Numbers(steps) = &tensor.plan else { return Err(refused("pictures are not numbers".into())) };
        let mut read = self.source.read(&tensor.columns, samples)?;
        watch.fetched(read.iter().map(Cells::memory_bytes).sum());
        watch.lap(Stage::Fetch);
        let mut cells =
            if read.len() == 1 { read.remove(0) } else { Cells::Numbers(side_by_side(&read).map_err(refused)?) };
        if self.pack.is_none()
            && let Cells::Lists(lists) = &cells
        {
            cells = Cells::Numbers(self.stacked(tensor, lists, samples)?);
        }
        for step in steps {
            cells = step.apply(cells).map_err(|(place, reason)| match place {
                Some(place) => DataError::Sample {
                    sample: self.source.row_name(samples[place]),
                    column: self.columns[tensor.columns[0]].clone(),
                    reason,
                },
                None => refused(reason),
            })?;
        }
        watch.lap(Stage::Transform);
        Ok(cells)
    }
}

/// The weights of the sources from each position on.
fn weights(config: &DatasetConfig) -> Vec<Weights> {
    if config.sources.is_empty() {
        return Vec::new();
    }
    let first = Weights { from: 0, weights: config.sources.iter().map(|s| s.weight).collect() };
    std::iter::once(first).chain(config.weights.iter().cloned()).collect()
}

/// The filter of a configuration, with the places of its columns.
fn filter(config: &DatasetConfig, columns: &[String], path: &Path) -> Result<Option<(Filter, Vec<usize>)>, DataError> {
    if config.filter.is_empty() {
        return Ok(None);
    }
    let filter = Filter::new(&config.filter).map_err(|reason| DataError::file(path, reason))?;
    let mut places = Vec::with_capacity(config.filter.len());
    for column in filter.columns() {
        let place = columns.iter().position(|c| c == column).ok_or_else(|| DataError::UnknownColumn {
            path: path.to_owned(),
            column: column.to_owned(),
            known: columns.to_vec(),
        })?;
        places.push(place);
    }
    Ok(Some((filter, places)))
}

/// Columns of numbers as the features of one tensor: \[samples, features\]. Columns of several types meet in `f64`.
fn side_by_side(columns: &[Cells]) -> Result<Tensor, String> {
    let mut tensors = Vec::with_capacity(columns.len());
    for column in columns {
        match column {
            Cells::Numbers(tensor) => tensors.push(tensor.clone()),
            Cells::Bytes(_) | Cells::Lists(_) => {
                return Err("columns of text, bytes or lists cannot be laid side by side".into());
            }
        }
    }
    let dtype = match tensors.first() {
        Some(first) if tensors.iter().all(|t| t.dtype() == first.dtype()) => first.dtype(),
        _ => DType::F64,
    };
    let samples = tensors.first().and_then(|t| t.shape().first()).copied().unwrap_or(0);
    let mut rows = vec![Vec::new(); samples];
    let mut features = 0;
    for tensor in &tensors {
        let tensor = tensor.cast(dtype).map_err(|e| e.to_string())?;
        let per_sample = tensor.len() / samples.max(1);
        features += per_sample;
        for (row, bytes) in
            rows.iter_mut().zip(tensor.bytes().chunks_exact((per_sample * dtype.size_in_memory()).max(1)))
        {
            row.extend_from_slice(bytes);
        }
    }
    Tensor::from_bytes(dtype, &[samples, features], &rows.concat()).map_err(|e| e.to_string())
}

/// The places of the tensors that are mixed.
fn mixed_tensors(mix: &Mix, tensors: &[TensorConfig]) -> Result<[usize; 2], DataError> {
    mix.check().map_err(|reason| DataError::tensor(&mix.pictures, reason))?;
    let names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
    let place = |name: &String| {
        let unknown = || format!("`mix` needs this tensor; {}", known_names(name, &names));
        names.iter().position(|n| n == name).ok_or_else(|| DataError::tensor(name, unknown()))
    };
    Ok([place(&mix.pictures)?, place(&mix.labels)?])
}

/// The digest of what the configuration says beyond where the data lies and how much memory it may take.
fn pipeline_digest(
    config: &DatasetConfig,
    configured: &[TensorConfig],
    tensors: &[PlannedTensor],
) -> serde_json::Result<Digest> {
    let parts = (&config.format, &config.rows, configured);
    let files: Vec<Digest> = tensors.iter().flat_map(|t| t.plan.digests()).collect();
    // What is not there is not hashed either, so that digests of older recipes stay.
    let plain = match &config.mix {
        None if files.is_empty() => serde_json::to_vec(&parts),
        Some(mix) if files.is_empty() => serde_json::to_vec(&(parts, mix)),
        mix => serde_json::to_vec(&(parts, mix, files)),
    }?;
    if config.sources.is_empty() && config.filter.is_empty() && config.pack.is_none() {
        return Ok(Digest::of(&plain));
    }
    let sources: Vec<_> = config.sources.iter().map(|s| (&s.format, &s.rows)).collect();
    let mut hasher = Hasher::new();
    hasher.field(&plain);
    hasher.field(&serde_json::to_vec(&(sources, &config.filter, &config.pack))?);
    Ok(hasher.finish())
}
