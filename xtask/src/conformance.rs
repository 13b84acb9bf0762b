//! ONNX's own node cases, run through everything here that runs graphs.
//!
//! Three run here: the reference evaluator, the same after the upgrade to the operator set that passes write, and the
//! CPU engine. Each case is a model with inputs and expected outputs. A case passes, is wrong, or is unsupported; a wrong one fails
//! the chore, and so does an unsupported one that is not on the checked-in list, so that support is never lost unseen.
//! Beside running, every case's model must survive being written and read again, and what inference says of its outputs
//! must agree with them, for the sizes of the case and with all input sizes as symbols.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use updraft_engine::{CompileOptions, CpuEngine, Engine, EngineError};
use updraft_graph::eval::{EvalError, evaluate};
use updraft_graph::onnx::{OnnxError, ReadOptions, WriteOptions, read, write};
use updraft_graph::upgrade::upgrade_model;
use updraft_graph::{Attribute, DType, Dim, Graph, Model, Tensor, ValueType};

use crate::{Failure, python};

/// Options of `conformance`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Rewrite the lists of unsupported cases and of operators in passing ones.
    #[arg(long)]
    bless: bool,
    /// Run only cases whose name contains this, and do not compare the list.
    #[arg(long)]
    only: Option<String>,
    /// The Python interpreter to use, instead of an environment made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
}

const PACKAGES: &[&str] = &["onnx==1.23.2", "numpy==2.4.6"];

/// Fewer passing cases than this fail the chore, whatever the list says.
const PASSED_MIN: usize = 1000;

/// Operators whose numbers ONNX leaves open: nothing can be compared.
const DRAWN: &[&str] =
    &["Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"];

struct Case {
    name: String,
    rtol: f64,
    atol: f64,
    data_sets: usize,
    inputs: usize,
    /// Why it is not written down as tensors; empty if it is.
    problem: String,
}

/// What running a case came to.
enum Outcome {
    Passed,
    Wrong(String),
    Unsupported(String),
}

type Runner = fn(&Model, &HashMap<String, Tensor>) -> Result<Vec<Tensor>, Refusal>;

/// Why a runner gave no outputs.
enum Refusal {
    Unsupported(String),
    Failed(String),
}

/// What runs the cases. A case that the first refuses is not given to the others, which fall back to it.
const RUNNERS: &[(&str, Runner)] = &[("reference", run_reference), ("upgraded", run_upgraded), ("engine", run_engine)];

fn run_reference(model: &Model, inputs: &HashMap<String, Tensor>) -> Result<Vec<Tensor>, Refusal> {
    evaluate(&model.graph, inputs).map_err(|error| match &error {
        EvalError::Node { source, .. } if source.is_unsupported() => Refusal::Unsupported(source.to_string()),
        _ => Refusal::Failed(error.to_string()),
    })
}

/// The reference evaluator on the case in the operator set that passes write.
fn run_upgraded(model: &Model, inputs: &HashMap<String, Tensor>) -> Result<Vec<Tensor>, Refusal> {
    let mut model = model.clone();
    match upgrade_model(&mut model) {
        Ok(_) => run_reference(&model, inputs),
        Err(error) => Err(Refusal::Unsupported(error.to_string())),
    }
}

fn run_engine(model: &Model, inputs: &HashMap<String, Tensor>) -> Result<Vec<Tensor>, Refusal> {
    let run = || {
        let mut session = CpuEngine::new(1)?.compile(&model.graph, &CompileOptions::default())?;
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        session.run(&inputs)
    };
    run().map_err(|error: EngineError| Refusal::Failed(error.to_string()))
}

/// Runs all cases, prints counts by operator, and fails as the module says.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let folder = root.join("target/conformance").join(PACKAGES.join("-"));
    let index = folder.join("cases.tsv");
    if !index.exists() {
        let python = match &arguments.python {
            Some(python) => python.clone(),
            None => python::environment(root, "conformance", PACKAGES)?,
        };
        python::run(Command::new(python).arg(root.join("xtask/src/conformance.py")).arg(&folder))?;
    }
    let cases = read_index(&index)?;
    let chosen = |case: &&Case| arguments.only.as_ref().is_none_or(|part| case.name.contains(part.as_str()));
    let mut found = Findings::default();
    for case in cases.iter().filter(chosen) {
        check(&folder, case, &mut found)?;
    }
    found.print();
    let list = root.join("xtask/conformance/unsupported.txt");
    if arguments.bless {
        std::fs::create_dir_all(root.join("xtask/conformance"))?;
        std::fs::write(&list, found.listing())?;
    }
    let passed = root.join("xtask/conformance/passed.txt");
    if arguments.bless {
        std::fs::write(&passed, found.passed_listing())?;
    }
    let mut failures = found.wrong.len();
    if arguments.only.is_none() {
        let expected = std::fs::read_to_string(&list).map_err(|e| format!("{}: {e}", list.display()))?;
        failures += compare_lists(&expected, &found.listing());
        if std::fs::read_to_string(&passed).map_err(|e| format!("{}: {e}", passed.display()))? != found.passed_listing()
        {
            println!("{} is not what passes now (--bless rewrites it)", passed.display());
            failures += 1;
        }
        for (runner, _) in RUNNERS {
            let passed = found.count(runner, 0);
            if passed < PASSED_MIN {
                println!("{runner}: {passed} cases pass, at least {PASSED_MIN} must");
                failures += 1;
            }
        }
    }
    if failures > 0 { Err(format!("conformance: {failures} findings").into()) } else { Ok(()) }
}

fn read_index(index: &Path) -> Result<Vec<Case>, Failure> {
    let text = std::fs::read_to_string(index)?;
    let parse = |line: &str| -> Option<Case> {
        let columns: Vec<&str> = line.split('\t').collect();
        let [name, rtol, atol, data_sets, inputs, problem] = columns[..] else { return None };
        Some(Case {
            name: name.to_owned(),
            rtol: rtol.parse().ok()?,
            atol: atol.parse().ok()?,
            data_sets: data_sets.parse().ok()?,
            inputs: inputs.parse().ok()?,
            problem: problem.to_owned(),
        })
    };
    text.lines().map(|line| parse(line).ok_or_else(|| format!("{}: {line:?}", index.display()).into())).collect()
}

/// What all cases came to.
#[derive(Default)]
struct Findings {
    /// Passed, wrong and unsupported cases of each runner and operator.
    counts: BTreeMap<(&'static str, String), [usize; 3]>,
    wrong: Vec<String>,
    /// Runner, case and reason.
    unsupported: BTreeSet<(&'static str, String, String)>,
    /// Cases that pass in the reference evaluator, by operator that occurs in them.
    exercised: BTreeMap<String, usize>,
}

impl Findings {
    fn add(&mut self, runner: &'static str, operator: &str, case: &Case, outcome: Outcome) {
        let counts = self.counts.entry((runner, operator.to_owned())).or_default();
        match outcome {
            Outcome::Passed => counts[0] += 1,
            Outcome::Wrong(how) => {
                counts[1] += 1;
                self.wrong.push(format!("{runner}: {}: {how}", case.name));
            }
            Outcome::Unsupported(why) => {
                counts[2] += 1;
                self.unsupported.insert((runner, case.name.clone(), why));
            }
        }
    }

    /// The list that tests read: operator, number of passing cases in which it occurs.
    fn passed_listing(&self) -> String {
        self.exercised.iter().map(|(operator, count)| format!("{operator} {count}\n")).collect()
    }

    fn count(&self, runner: &str, outcome: usize) -> usize {
        self.counts.iter().filter(|((r, _), _)| *r == runner).map(|(_, counts)| counts[outcome]).sum()
    }

    fn print(&self) {
        println!("{:10} {:32} {:>7} {:>7} {:>12}", "runner", "operator", "passed", "wrong", "unsupported");
        for ((runner, operator), [passed, wrong, unsupported]) in &self.counts {
            println!("{runner:10} {operator:32} {passed:7} {wrong:7} {unsupported:12}");
        }
        self.wrong.iter().for_each(|line| println!("wrong: {line}"));
        for (runner, _) in RUNNERS {
            println!(
                "{runner}: {} passed, {} wrong, {} unsupported",
                self.count(runner, 0),
                self.count(runner, 1),
                self.count(runner, 2)
            );
        }
    }

    /// The list that is checked in: runner, case, reason. What the reference refuses is listed for it alone.
    fn listing(&self) -> String {
        let refused: BTreeSet<&str> = (self.unsupported.iter())
            .filter(|(runner, ..)| *runner == "reference")
            .map(|(_, case, _)| case.as_str())
            .collect();
        let is_listed = |runner: &str, case: &str| runner == "reference" || !refused.contains(case);
        (self.unsupported.iter())
            .filter(|(runner, case, _)| is_listed(runner, case))
            .map(|(runner, case, why)| format!("{runner} {case}: {why}\n"))
            .collect()
    }
}

/// How many runner-case pairs are on one list only; prints them.
fn compare_lists(expected: &str, found: &str) -> usize {
    let pairs = |text: &str| -> BTreeSet<String> {
        text.lines().filter_map(|line| line.split_once(':')).map(|(pair, _)| pair.to_owned()).collect()
    };
    let (expected, found) = (pairs(expected), pairs(found));
    for pair in found.difference(&expected) {
        println!("not supported any more: {pair}");
    }
    for pair in expected.difference(&found) {
        println!("supported now, but still on the list (--bless takes it off): {pair}");
    }
    found.symmetric_difference(&expected).count()
}

fn check(folder: &Path, case: &Case, found: &mut Findings) -> Result<(), Failure> {
    let place = folder.join(&case.name);
    let bytes = std::fs::read(place.join("model.onnx"))?;
    let model = match read(&bytes, &ReadOptions::default()) {
        Ok(model) => model,
        Err(error) => {
            for (runner, _) in RUNNERS {
                let outcome = match error {
                    OnnxError::Opset { .. } => Outcome::Unsupported(error.to_string()),
                    _ => Outcome::Wrong(error.to_string()),
                };
                found.add(runner, "(unreadable)", case, outcome);
            }
            return Ok(());
        }
    };
    let operator = operator_of(case, &model);
    if let Err(problem) = check_round_trip(&model) {
        found.add("files", &operator, case, Outcome::Wrong(problem));
    }
    let drawn = model.graph.nodes().any(|(_, node)| DRAWN.contains(&node.op.as_str()));
    let mut refused: Option<String> = None;
    for (runner, run) in RUNNERS {
        let outcome = if let Some(why) = &refused {
            Outcome::Unsupported(why.clone())
        } else if !case.problem.is_empty() {
            Outcome::Unsupported(case.problem.clone())
        } else if drawn {
            Outcome::Unsupported("random numbers, whose generator ONNX leaves open".to_owned())
        } else {
            run_case(&place, case, &model, *run)?
        };
        if let (Outcome::Unsupported(why), "reference") = (&outcome, *runner) {
            refused = Some(why.clone());
        }
        if matches!(outcome, Outcome::Passed) && *runner == "reference" {
            for number in 0..case.data_sets {
                let (inputs, outputs) = read_data(&place, case, number)?;
                if let Err(problem) = check_inference(&model, &inputs, &outputs) {
                    found.add("inference", &operator, case, Outcome::Wrong(problem));
                }
            }
            let mut operators = BTreeSet::new();
            collect_operators(&model.graph, &mut operators);
            for operator in operators {
                *found.exercised.entry(operator).or_default() += 1;
            }
        }
        found.add(runner, &operator, case, outcome);
    }
    Ok(())
}

/// The operator that a case is about. Expansions into other operators count for the operator whose meaning they spell
/// out, which only their name tells.
fn operator_of(case: &Case, model: &Model) -> String {
    let mut nodes = model.graph.nodes().map(|(_, node)| node.op.clone());
    match (nodes.next(), nodes.next()) {
        (Some(only), None) => only,
        _ if case.name.contains("_expanded") => "(expanded)".to_owned(),
        _ => "(several)".to_owned(),
    }
}

/// The operators of a graph and of the graphs in its attributes.
fn collect_operators(graph: &Graph, out: &mut BTreeSet<String>) {
    for (_, node) in graph.nodes() {
        out.insert(node.op.clone());
        for (_, attribute) in node.attributes.iter() {
            if let Attribute::Graph(inner) = attribute {
                collect_operators(inner, out);
            }
        }
    }
}

/// Writing and reading gives the same model, and writing that gives the same bytes.
fn check_round_trip(model: &Model) -> Result<(), String> {
    let options = WriteOptions::default;
    let bytes = write(model, options()).map_err(|e| format!("writing: {e}"))?;
    let again = read(&bytes, &ReadOptions::default()).map_err(|e| format!("reading back: {e}"))?;
    let mut sorted = model.clone();
    sorted.graph.sort().map_err(|e| e.to_string())?;
    if !same_text(&again, &sorted) {
        return Err("the model read back is another".to_owned());
    }
    if write(&again, options()).map_err(|e| format!("writing again: {e}"))? != bytes {
        return Err("writing the model read back gives other bytes".to_owned());
    }
    Ok(())
}

/// Equality by what is shown, since constants may hold numbers that are not equal to themselves.
fn same_text(a: &Model, b: &Model) -> bool {
    a == b || format!("{a:?}") == format!("{b:?}")
}

fn read_data(place: &Path, case: &Case, number: usize) -> Result<(Vec<Tensor>, Vec<Tensor>), Failure> {
    let path = place.join(format!("data_{number}.onnx"));
    let data = read(&std::fs::read(&path)?, &ReadOptions::default()).map_err(|e| format!("{}: {e}", path.display()))?;
    let tensors: Option<Vec<Tensor>> =
        data.graph.outputs().iter().map(|v| data.graph.value(*v).constant().cloned()).collect();
    let mut inputs = tensors.ok_or_else(|| format!("{}: an output is no constant", path.display()))?;
    let outputs = inputs.split_off(case.inputs.min(inputs.len()));
    Ok((inputs, outputs))
}

fn run_case(place: &Path, case: &Case, model: &Model, run: Runner) -> Result<Outcome, Failure> {
    for number in 0..case.data_sets {
        let (inputs, expected) = read_data(place, case, number)?;
        let names = model.graph.inputs().iter().map(|v| model.graph.value(*v).name.clone());
        let outputs = match run(model, &names.zip(inputs).collect()) {
            Ok(outputs) => outputs,
            Err(Refusal::Unsupported(why)) => return Ok(Outcome::Unsupported(why)),
            Err(Refusal::Failed(how)) => return Ok(Outcome::Wrong(how)),
        };
        if outputs.len() != expected.len() {
            return Ok(Outcome::Wrong(format!("{} outputs, expected {}", outputs.len(), expected.len())));
        }
        for (i, (output, expected)) in outputs.iter().zip(&expected).enumerate() {
            if let Err(how) = compare(output, expected, case) {
                return Ok(Outcome::Wrong(format!("output {i}: {how}")));
            }
        }
    }
    Ok(Outcome::Passed)
}

/// Equal types and shapes, and elements within `atol + rtol * |expected|` as ONNX's own backend test compares them, but
/// never closer than the expected values are right.
fn compare(output: &Tensor, expected: &Tensor, case: &Case) -> Result<(), String> {
    if (output.dtype(), output.shape()) != (expected.dtype(), expected.shape()) {
        return Err(format!(
            "{}{:?}, expected {}{:?}",
            output.dtype(),
            output.shape(),
            expected.dtype(),
            expected.shape()
        ));
    }
    if let (Ok(a), Ok(b)) = (output.strings(), expected.strings()) {
        return if a == b { Ok(()) } else { Err("other strings".to_owned()) };
    }
    if output.bytes() == expected.bytes() {
        return Ok(());
    }
    // The expected values carry the rounding of the reference that made them, in an order of additions that ONNX leaves
    // open. Two steps between neighbouring numbers are allowed for that: for narrow floats, which it rounds after every
    // operation, steps at the element itself; for f32, steps at the largest element, since where a sum cancels (the
    // inverse Fourier transform gives 1.9e-7 for zero) the error is of the size of its terms.
    let steps = |bits: i32| 2.0 * f64::powi(2.0, -bits);
    let (rtol, share_of_largest) = match output.dtype() {
        DType::F16 => (case.rtol.max(steps(10)), 0.0),
        DType::BF16 => (case.rtol.max(steps(7)), 0.0),
        DType::F32 => (case.rtol, steps(23)),
        _ => (case.rtol, 0.0),
    };
    let (a, b) = (output.to_f64().map_err(|e| e.to_string())?, expected.to_f64().map_err(|e| e.to_string())?);
    let largest = b.iter().filter(|v| v.is_finite()).fold(0.0, |largest: f64, v| largest.max(v.abs()));
    let atol = case.atol.max(share_of_largest * largest);
    let close = |x: f64, y: f64| x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= atol + rtol * y.abs();
    match a.iter().zip(&b).position(|(x, y)| !close(*x, *y)) {
        Some(at) => Err(format!("element {at} of {:?} is {}, expected {}", output.shape(), a[at], b[at])),
        None => Ok(()),
    }
}

/// Inference finds the types and shapes that the outputs have. Integer inputs of rank 0 and 1 are given as constants,
/// since shapes follow from them; the others once with their sizes and once with a symbol for each size.
fn check_inference(model: &Model, inputs: &[Tensor], outputs: &[Tensor]) -> Result<(), String> {
    for symbolic in [false, true] {
        let mut graph = model.graph.clone();
        let mut sizes: HashMap<String, usize> = HashMap::new();
        let given: Vec<_> = graph.inputs().iter().copied().zip(inputs).collect();
        let mut open = Vec::new();
        for (i, (value, tensor)) in given.into_iter().enumerate() {
            if tensor.dtype().is_integer() && tensor.rank() <= 1 {
                graph.set_constant(value, Some(tensor.clone()));
                continue;
            }
            open.push(value);
            let dim = |(axis, size): (usize, &usize)| match symbolic {
                true => {
                    let name = format!("input{i}_axis{axis}");
                    sizes.insert(name.clone(), *size);
                    Dim::symbol(&name)
                }
                false => Dim::Known(*size),
            };
            let shape = tensor.shape().iter().enumerate().map(dim).collect();
            graph.set_type(value, ValueType::tensor(tensor.dtype(), shape));
        }
        graph.set_inputs(open);
        forget_types(&mut graph);
        updraft_graph::infer::infer(&mut graph).map_err(|e| e.to_string())?;
        for (value, output) in graph.outputs().iter().zip(outputs) {
            let ty = &graph.value(*value).ty;
            let dtype_fits = ty.dtype().is_none_or(|dtype| dtype == output.dtype());
            let fits = |(dim, size): (&Dim, &usize)| {
                dim.evaluate(&|name| sizes.get(name).copied()).is_none_or(|found| found == *size)
            };
            let shape_fits = ty
                .shape()
                .is_none_or(|shape| shape.len() == output.rank() && shape.iter().zip(output.shape()).all(fits));
            if !dtype_fits || !shape_fits {
                return Err(format!("{ty:?} is not {}{:?}", output.dtype(), output.shape()));
            }
        }
    }
    Ok(())
}

/// What the file declares of values that nodes make would only repeat the answer.
fn forget_types(graph: &mut Graph) {
    let made: Vec<_> = graph.values().filter(|(_, v)| v.producer().is_some()).map(|(id, _)| id).collect();
    for value in made {
        graph.set_type(value, ValueType::Unknown);
    }
}
