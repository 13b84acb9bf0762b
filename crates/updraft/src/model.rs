//! Models as files, and what verbs ask of them.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use updraft_base::Digest;
use updraft_engine::{CompileOptions, CpuEngine, Engine, Session};
use updraft_graph::onnx::{self, ReadOptions, WriteOptions};
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{Graph, Model, ValueId, check, infer, upgrade};
use updraft_passes::pipeline;

use crate::failure::{Failure, Kind};

/// Metadata key of the characters that a language model's tokens stand for, as one string.
pub(crate) const VOCABULARY_KEY: &str = "updraft.vocabulary";

/// Metadata key of the longest sequence that a language model was trained on.
pub(crate) const CONTEXT_KEY: &str = "updraft.context";

/// Metadata key of the names of classes, as a JSON array.
pub(crate) const CLASSES_KEY: &str = "updraft.classes";

/// A model that was read from a file.
pub(crate) struct LoadedModel {
    /// The model, with all types and shapes that can be known worked out.
    pub(crate) model: Model,
    /// The digest of the file; data that it keeps in others is not part of it.
    pub(crate) digest: Digest,
    /// The size of the file.
    pub(crate) size_bytes: u64,
}

/// Reads and checks an ONNX file, with data that it keeps in files beside it, and brings it to the operator set that all
/// else is written for.
pub(crate) fn load(path: &Path) -> Result<LoadedModel, Failure> {
    let bytes = std::fs::read(path).map_err(|e| Failure::io("read", path, &e))?;
    let model = decode(&bytes, path)?;
    Ok(LoadedModel { model, digest: Digest::of(&bytes), size_bytes: bytes.len() as u64 })
}

/// The model in the bytes of a file; `path` is for messages and for data in files beside it.
pub(crate) fn decode(bytes: &[u8], path: &Path) -> Result<Model, Failure> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let fetch = |location: &str, offset: u64, len: u64| fetch(&folder.join(location), offset, len);
    let bad = |e: &dyn std::error::Error| Failure::of(Kind::Input, e).about(path);
    let mut model = onnx::read(bytes, &ReadOptions { external: Some(&fetch) }).map_err(|e| bad(&e))?;
    check::check_model(&model).map_err(|e| bad(&e))?;
    // One form from here on, so that nothing else has to know what older versions meant.
    upgrade::inline_functions(&mut model).map_err(|e| bad(&e))?;
    upgrade::upgrade_model(&mut model).map_err(|e| bad(&e))?;
    infer::infer(&mut model.graph).map_err(|e| bad(&e))?;
    Ok(model)
}

/// Some bytes of a file, none where it is shorter.
fn fetch(path: &Path, offset: u64, len: u64) -> Result<Vec<u8>, String> {
    let mut file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let size = file.metadata().map_err(|e| e.to_string())?.len();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(format!("it has {size} bytes; {len} from byte {offset} were expected"));
    }
    file.seek(SeekFrom::Start(offset)).map_err(|e| e.to_string())?;
    let mut bytes = vec![0; usize::try_from(len).map_err(|e| e.to_string())?];
    file.read_exact(&mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// The bytes of a model.
pub(crate) fn encode(model: &Model) -> Result<Vec<u8>, Failure> {
    onnx::write(model, WriteOptions::default()).map_err(|e| Failure::of(Kind::Unsupported, &e))
}

/// Inputs that must be given: those without a default.
pub(crate) fn inputs(graph: &Graph) -> Vec<ValueId> {
    graph.inputs().iter().copied().filter(|v| graph.value(*v).constant().is_none()).collect()
}

/// The value of a metadata key of a model or of its graph.
pub(crate) fn metadata<'a>(model: &'a Model, key: &str) -> Option<&'a str> {
    let pairs = model.metadata.iter().chain(&model.graph.metadata);
    pairs.into_iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
}

/// The network of the zoo of this name, or what is wrong with the name.
pub(crate) fn zoo_entry(name: &str) -> Result<&'static zoo::Entry, String> {
    zoo::find(name).ok_or_else(|| {
        let known: Vec<&str> = zoo::ENTRIES.iter().map(|e| e.name).collect();
        let near = updraft_base::nearest(name, known.iter().copied());
        let near = near.map(|n| format!(", did you mean `{n}`?")).unwrap_or_default();
        format!("is `{name}`{near}; the zoo has {}", known.join(", "))
    })
}

/// A network of the zoo, with weights drawn from the seed.
pub(crate) fn build(entry: &zoo::Entry, given: &[(String, Setting)], seed: u64) -> Result<Graph, Failure> {
    let options = Options::of(entry, given)?;
    entry.build(&options, seed).map_err(|e| Failure::of(Kind::Usage, &e))
}

/// `NAME=VALUE`, read as the option's kind.
pub(crate) fn parse_setting(entry: &zoo::Entry, text: &str) -> Result<(String, Setting), Failure> {
    let usage = |problem: String| Failure::new(Kind::Usage, problem);
    let (name, value) = text.split_once('=').ok_or_else(|| usage(format!("`{text}` is not of the form NAME=VALUE")))?;
    let option = entry.options.iter().find(|o| o.name == name);
    // An unknown name is left to the zoo, which knows the nearest; any kind will do for it.
    let kind = option.map_or(Setting::Float(0.0), |o| o.default.setting());
    let parsed = match kind {
        Setting::Integer(_) => value.parse().ok().map(Setting::Integer),
        Setting::Integers(_) => {
            value.split(',').map(|v| v.trim().parse().ok()).collect::<Option<_>>().map(Setting::Integers)
        }
        Setting::Float(_) => value.parse().ok().map(Setting::Float),
        Setting::Flag(_) => value.parse().ok().map(Setting::Flag),
    };
    match parsed {
        Some(setting) => Ok((name.to_owned(), setting)),
        None if option.is_none() => Ok((name.to_owned(), Setting::Flag(true))),
        None => Err(usage(format!("option `{name}` takes a value like `{}`, found `{value}`", kind))),
    }
}

/// The graph for batches of so many samples: for any number, where it is written for another one.
pub(crate) fn for_batches(graph: &Graph, samples: usize) -> Result<Graph, Failure> {
    let mut graph = graph.clone();
    let lead = |v: &ValueId| graph.shape(*v).and_then(|s| s.first()?.known());
    if inputs(&graph).iter().all(|v| lead(v) == Some(samples)) {
        return Ok(graph);
    }
    updraft_passes::open_batch(&mut graph).map_err(|e| Failure::of(Kind::Unsupported, &e))?;
    Ok(graph)
}

/// A model ready to answer: rewritten for inference and compiled.
pub(crate) fn compile(graph: &Graph, threads: usize) -> Result<Box<dyn Session>, Failure> {
    let mut graph = graph.clone();
    pipeline::inference(&mut graph).map_err(|e| Failure::of(Kind::Unsupported, &e))?;
    Ok(CpuEngine::new(threads)?.compile(&graph, &CompileOptions::default())?)
}
