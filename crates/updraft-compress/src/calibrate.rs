//! Ranges of values, found by running a network on data.
//!
//! Of each value a histogram is kept ([`crate::histogram`]) and nothing else, so memory is that of one batch and a few
//! kilobytes a value, however many samples there are.

use std::collections::BTreeMap;

use updraft_data::{Batch, DataError};
use updraft_engine::{CompileOptions, Engine, Session};
use updraft_graph::{DType, Graph, Tensor};
use updraft_passes::quantize::Range;

use crate::error::CompressError;
use crate::histogram::{Histogram, Scratch};

/// How a range is chosen from the elements seen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// From the least to the greatest.
    MinMax,
    /// What holds this share of the elements, in percent.
    Percentile(f64),
    /// Where codes tell most about the distribution: [`Histogram::entropy`].
    Entropy,
    /// Where codes of this many bits lose least in the mean of squares: [`Histogram::least_squares`].
    Mse {
        /// Bits of a code.
        bits: u32,
    },
}

impl Method {
    /// The range of the elements counted; `None` where there are none.
    pub fn range(self, histogram: &Histogram) -> Option<Range> {
        match self {
            Method::MinMax => histogram.range(),
            Method::Percentile(percent) => histogram.percentile(percent),
            // As many levels as magnitudes have in signed bytes.
            Method::Entropy => histogram.entropy(128),
            Method::Mse { bits } => histogram.least_squares((1u32 << bits.clamp(1, 31)) - 1),
        }
    }

    fn check(self) -> Result<(), CompressError> {
        match self {
            Method::Percentile(percent) if !(percent > 0.0 && percent <= 100.0) => Err(CompressError::Setting {
                setting: "percentile",
                problem: format!("is {percent}, expected more than 0 and at most 100"),
            }),
            _ => Ok(()),
        }
    }
}

/// The range of each of `values` over all batches.
///
/// Batches have the network's inputs by name, and may have more.
///
/// # Errors
/// No samples; a value that the graph does not have; an element that is not a finite number, named by sample and value;
/// what the engine or the data refuse.
pub fn calibrate(
    engine: &dyn Engine,
    graph: &Graph,
    values: &[String],
    batches: impl Iterator<Item = Result<Batch, DataError>>,
    method: Method,
) -> Result<BTreeMap<String, Range>, CompressError> {
    method.check()?;
    let mut observer = Observer::new(engine, graph, values, 1)?.for_method(method);
    for batch in batches {
        observer.observe(&batch?)?;
    }
    observer.ranges(method)
}

/// Watches values while a network runs.
pub struct Observer {
    session: Option<Box<dyn Session>>,
    inputs: Vec<Input>,
    /// In the order of the session's outputs.
    made: Vec<(String, Histogram)>,
    scratch: Vec<Scratch>,
    /// Whether elements are counted, or only the least and the greatest kept.
    is_counting: bool,
}

/// An input of a network that data must give.
pub(crate) struct Input {
    pub(crate) name: String,
    /// Whether any number of samples fits.
    is_open: bool,
    /// Its elements, where they are to be watched.
    histogram: Option<Histogram>,
}

impl Input {
    pub(crate) fn all(graph: &Graph) -> Vec<Input> {
        let open = graph.inputs().iter().filter(|v| graph.value(**v).constant().is_none());
        open.map(|v| Input {
            name: graph.value(*v).name.clone(),
            is_open: graph.shape(*v).and_then(|s| s.first()).is_some_and(|d| d.known().is_none()),
            histogram: None,
        })
        .collect()
    }

    /// The tensor that a batch has for the input, without padding where any number of samples fits.
    pub(crate) fn of(&self, batch: &Batch) -> Result<Tensor, CompressError> {
        let found = batch.tensors.iter().find(|(name, _)| *name == self.name);
        let (_, tensor) = found.ok_or_else(|| missing(&self.name, batch))?;
        let tensor = if self.is_open { first_rows(tensor, batch.samples.len())? } else { tensor.clone() };
        if tensor.dtype() == DType::F32 {
            check_finite(&self.name, &tensor, batch)?;
        }
        Ok(tensor)
    }
}

impl Observer {
    /// Watches `values` of a graph, counting on `threads` threads.
    pub fn new(
        engine: &dyn Engine,
        graph: &Graph,
        values: &[String],
        threads: usize,
    ) -> Result<Observer, CompressError> {
        let mut watched = graph.clone();
        let mut outputs = Vec::new();
        let mut made = Vec::new();
        let mut given = Vec::new();
        for name in values {
            let found = graph.find(name).filter(|v| graph.dtype(*v) == Some(DType::F32));
            let v = found.ok_or_else(|| CompressError::Setting {
                setting: "values",
                problem: format!("name {name:?}, which is no value of f32 in the graph"),
            })?;
            if graph.inputs().contains(&v) {
                given.push(v);
            } else {
                outputs.push(v);
                made.push((name.clone(), Histogram::default()));
            }
        }
        let mut inputs = Input::all(graph);
        for input in &mut inputs {
            let is_watched = given.iter().any(|v| graph.value(*v).name == input.name);
            input.histogram = is_watched.then(Histogram::default);
        }
        watched.set_outputs(outputs);
        let session = match made.is_empty() {
            true => None,
            false => Some(engine.compile(&watched, &CompileOptions::default())?),
        };
        let scratch = (0..threads.max(1)).map(|_| Scratch::default()).collect();
        Ok(Observer { session, inputs, made, scratch, is_counting: true })
    }

    /// Keeps what this method needs and no more: ranges by others cannot be asked for.
    pub fn for_method(self, method: Method) -> Observer {
        Observer { is_counting: method != Method::MinMax, ..self }
    }

    /// Runs the network on a batch and counts what it makes.
    pub fn observe(&mut self, batch: &Batch) -> Result<(), CompressError> {
        let is_counting = self.is_counting;
        let mut tensors = Vec::with_capacity(self.inputs.len());
        for input in &mut self.inputs {
            let tensor = input.of(batch)?;
            if let Some(histogram) = input.histogram.as_mut().filter(|_| tensor.dtype() == DType::F32) {
                let scratch = is_counting.then_some(&mut self.scratch[0]);
                count(histogram, scratch, &input.name, &tensor, batch)?;
            }
            tensors.push((input.name.clone(), tensor));
        }
        let Some(session) = &mut self.session else { return Ok(()) };
        let given: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = session.run(&given)?;
        let mut work: Vec<(&mut (String, Histogram), Tensor)> = self.made.iter_mut().zip(outputs).collect();
        // The largest first, each to the thread with the least to do: the same shares in every run.
        work.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.len()));
        let mut shares: Vec<(usize, Vec<_>)> = self.scratch.iter().map(|_| (0, Vec::new())).collect();
        for item in work {
            if let Some(share) = shares.iter_mut().min_by_key(|(elements, _)| *elements) {
                share.0 += item.1.len();
                share.1.push(item);
            }
        }
        let count_share = |scratch: &mut Scratch, share: Vec<(&mut (String, Histogram), Tensor)>| {
            share.into_iter().try_for_each(|((name, histogram), tensor)| {
                count(histogram, is_counting.then_some(&mut *scratch), name, &tensor, batch)
            })
        };
        std::thread::scope(|scope| {
            let mut pairs = self.scratch.iter_mut().zip(shares).map(|(scratch, (_, share))| (scratch, share));
            let own = pairs.next();
            let others: Vec<_> = pairs.map(|(scratch, share)| scope.spawn(|| count_share(scratch, share))).collect();
            let mut done = own.map_or(Ok(()), |(scratch, share)| count_share(scratch, share));
            for other in others {
                let result = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                done = done.and(result);
            }
            done
        })
    }

    /// The ranges of all that was seen, by the names of the values.
    pub fn ranges(&self, method: Method) -> Result<BTreeMap<String, Range>, CompressError> {
        method.check()?;
        if !self.is_counting && method != Method::MinMax {
            let problem = format!("by {method:?} needs elements counted, and only extremes were kept");
            return Err(CompressError::Setting { setting: "calibration", problem });
        }
        let given = self.inputs.iter().filter_map(|input| Some((&input.name, input.histogram.as_ref()?)));
        let all = self.made.iter().map(|(name, histogram)| (name, histogram)).chain(given);
        all.map(|(name, histogram)| {
            let range = method.range(histogram).ok_or_else(|| CompressError::Setting {
                setting: "samples",
                problem: format!("are none, so {name:?} has no range"),
            })?;
            Ok((name.clone(), range))
        })
        .collect()
    }

    /// Bytes kept from batch to batch, but for the session's.
    pub fn state_bytes(&self) -> usize {
        let given = self.inputs.iter().filter_map(|input| input.histogram.as_ref());
        self.made
            .iter()
            .map(|(_, histogram)| histogram)
            .chain(given)
            .map(|h| size_of::<Histogram>() + h.heap_bytes())
            .sum()
    }
}

fn count(
    histogram: &mut Histogram,
    scratch: Option<&mut Scratch>,
    name: &str,
    tensor: &Tensor,
    batch: &Batch,
) -> Result<(), CompressError> {
    let elements = tensor
        .as_slice::<f32>()
        .map_err(|e| CompressError::Setting { setting: "values", problem: format!("name {name:?}: {e}") })?;
    let added = match scratch {
        Some(scratch) => histogram.add(elements, scratch),
        None => histogram.widen(elements),
    };
    added.map_err(|index| not_finite(name, tensor, index, batch))
}

fn check_finite(name: &str, tensor: &Tensor, batch: &Batch) -> Result<(), CompressError> {
    let elements = tensor.as_slice::<f32>().unwrap_or(&[]);
    match elements.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(not_finite(name, tensor, index, batch)),
        None => Ok(()),
    }
}

/// The error for an element, with the sample that it belongs to.
fn not_finite(name: &str, tensor: &Tensor, index: usize, batch: &Batch) -> CompressError {
    let rows = tensor.shape().first().copied().unwrap_or(1).max(1);
    let per_row = (tensor.len() / rows).max(1);
    // A value with another number of rows than the batch is not one row a sample; then the first sample is named.
    let row = if rows >= batch.samples.len() { index / per_row } else { 0 };
    let sample = batch.samples.get(row).or(batch.samples.first()).copied().unwrap_or(0);
    let value = tensor.as_slice::<f32>().ok().and_then(|v| v.get(index)).copied().unwrap_or(f32::NAN);
    CompressError::NotFinite { output: name.to_owned(), value: value.into(), sample }
}

fn missing(name: &str, batch: &Batch) -> CompressError {
    let known: Vec<&str> = batch.tensors.iter().map(|(name, _)| name.as_str()).collect();
    let near = updraft_base::nearest(name, known.iter().copied());
    let near = near.map(|n| format!(", did you mean {n:?}?")).unwrap_or_default();
    CompressError::Setting {
        setting: "data",
        problem: format!("has no tensor for the input {name:?}{near}; it has {}", known.join(", ")),
    }
}

fn first_rows(tensor: &Tensor, rows: usize) -> Result<Tensor, CompressError> {
    let mut shape = tensor.shape().to_vec();
    let Some(first) = shape.first_mut().filter(|n| **n > rows) else { return Ok(tensor.clone()) };
    let row_bytes = tensor.byte_len() / *first;
    *first = rows;
    let cut = Tensor::from_bytes(tensor.dtype(), &shape, &tensor.bytes()[..rows * row_bytes]);
    cut.map_err(|e| CompressError::Setting { setting: "batch", problem: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use updraft_base::random::{Key, fill_normal};
    use updraft_engine::CpuEngine;
    use updraft_graph::{ValueType, dim::dims};

    fn network() -> Graph {
        let mut g = Graph::new("net");
        let mut shape = dims(&[0, 3]);
        shape[0] = "N".into();
        let x = g.add_input("x", ValueType::tensor(DType::F32, shape)).unwrap();
        let w = g.add_constant("w", Tensor::new(&[3, 2], &[1f32, -1.0, 0.5, 2.0, 0.0, 1.0]).unwrap());
        let y = g.op("MatMul", &[x, w], []).unwrap();
        let z = g.op("Relu", &[y], []).unwrap();
        g.push_output(z);
        g
    }

    /// Batches of four samples, each wider than the one before, the last half empty.
    fn batches(n: u64) -> impl Iterator<Item = Result<Batch, DataError>> {
        (0..n).map(move |step| {
            let mut values = vec![0f32; 12];
            fill_normal(&Key::new(5).child_index(step), 0, &mut values);
            values.iter_mut().for_each(|v| *v *= 1.0 + step as f32 * 0.01);
            let samples = (step * 4..step * 4 + if step + 1 == n { 2 } else { 4 }).collect();
            let tensors = vec![("x".to_owned(), Tensor::new(&[4, 3], &values).unwrap())];
            Ok(Batch { step, epoch: 0, tensors, samples })
        })
    }

    fn names() -> Vec<String> {
        ["x", "Relu"].map(str::to_owned).into()
    }

    #[test]
    fn the_state_of_ten_thousand_samples_is_as_large_as_that_of_a_hundred() {
        let engine = CpuEngine::new(1).unwrap();
        let size = |n: u64| {
            let mut observer = Observer::new(&engine, &network(), &names(), 2).unwrap();
            batches(n).for_each(|batch| observer.observe(&batch.unwrap()).unwrap());
            observer.state_bytes()
        };
        assert_eq!(size(25), size(2500));
    }

    #[test]
    fn ranges_are_those_of_all_samples_whatever_the_threads_and_padding_does_not_count() {
        let engine = CpuEngine::new(1).unwrap();
        let by = |threads: usize, method: Method| {
            let mut observer = Observer::new(&engine, &network(), &names(), threads).unwrap();
            batches(9).for_each(|batch| observer.observe(&batch.unwrap()).unwrap());
            observer.ranges(method).unwrap()
        };
        let mut seen: Vec<f32> = Vec::new();
        for batch in batches(9) {
            let batch = batch.unwrap();
            seen.extend(&batch.tensors[0].1.as_slice::<f32>().unwrap()[..batch.samples.len() * 3]);
        }
        let whole = by(1, Method::MinMax);
        let fold = |f: fn(f32, f32) -> f32| seen.iter().copied().fold(0.0, f);
        assert_eq!(whole["x"], Range { min: fold(f32::min), max: fold(f32::max) });
        assert_eq!(whole["Relu"].min, 0.0);
        for method in [Method::MinMax, Method::Percentile(99.0), Method::Entropy, Method::Mse { bits: 8 }] {
            assert_eq!(by(1, method), by(3, method));
            let made = calibrate(&engine, &network(), &names(), batches(9), method).unwrap();
            assert_eq!(made, by(1, method));
            assert!(made["x"].max <= whole["x"].max && made["x"].min >= whole["x"].min);
        }
        let extremes = Observer::new(&engine, &network(), &names(), 1).unwrap().for_method(Method::MinMax);
        assert!(extremes.ranges(Method::Entropy).unwrap_err().to_string().contains("only extremes"));
    }

    #[test]
    fn bad_data_is_named_by_sample_and_value() {
        let engine = CpuEngine::new(1).unwrap();
        let run = |change: fn(&mut Batch)| {
            let changed = batches(3).map(|batch| {
                let mut batch = batch.unwrap();
                if batch.step == 1 {
                    change(&mut batch);
                }
                Ok(batch)
            });
            calibrate(&engine, &network(), &names(), changed, Method::MinMax).unwrap_err().to_string()
        };
        let found = run(|batch| batch.tensors[0].1.as_mut_slice::<f32>().unwrap()[7] = f32::NAN);
        assert!(found.contains("\"x\"") && found.contains("NaN") && found.contains("sample 6"), "{found}");
        // Finite by itself, and no longer after the product.
        let found = run(|batch| batch.tensors[0].1.as_mut_slice::<f32>().unwrap()[3..6].fill(3e38));
        assert!(found.contains("\"Relu\"") && found.contains("inf") && found.contains("sample 5"), "{found}");
        let found = run(|batch| batch.tensors[0].0 = "y".to_owned());
        assert!(found.contains("input \"x\"") && found.contains("has y"), "{found}");
        let found = run(|batch| batch.tensors[0].1 = Tensor::zeros(DType::F32, &[4, 5]).unwrap());
        assert!(found.contains("\"x\""), "{found}");
        let none = calibrate(&engine, &network(), &names(), batches(0), Method::MinMax).unwrap_err().to_string();
        assert!(none.contains("samples are none"), "{none}");
        let wrong = calibrate(&engine, &network(), &names(), batches(1), Method::Percentile(0.0)).unwrap_err();
        assert!(wrong.to_string().contains("percentile is 0"), "{wrong}");
    }
}
