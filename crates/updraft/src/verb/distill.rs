//! `updraft distill`: a student that learns from a teacher.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use updraft_base::units;
use updraft_graph::Graph;
use updraft_passes::distill::{Distillation, Match, MatchKind};
use updraft_train::metrics::Metrics;

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::stage::{Data, Network, Stages, Teaching};
use crate::{model, output};

/// Train a small model to answer as a large one does
///
/// The student learns the teacher's answers beside the labels, or instead of them, and on request what the teacher
/// computes on the way. Optimizer, learning rate and steps are those of the recipe's `[train]`; a run that was killed
/// goes on where it was.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The teacher: an ONNX model.
    #[arg(long, value_name = "FILE")]
    teacher: PathBuf,

    /// The student: an ONNX model, or `zoo:NAME` for a network that is untrained; without it, the recipe's.
    #[arg(long, value_name = "FILE|zoo:NAME")]
    student: Option<String>,

    /// Sets an option of the zoo network, such as `hidden=16`. Repeat for more.
    #[arg(long = "option", value_name = "NAME=VALUE", requires = "student")]
    options: Vec<String>,

    /// The recipe with the data: an `updraft.toml`, or the folder that holds it.
    #[arg(long, value_name = "RECIPE")]
    data: PathBuf,

    /// Also write the trained student to a file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Share of the teacher's answers in the loss, from 0 to 1; the labels have the rest.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, conflicts_with = "label_free")]
    alpha: f32,

    /// Divides the logits of both before they are compared: the higher, the more unlikely classes count.
    #[arg(long, value_name = "T", default_value_t = 4.0)]
    temperature: f32,

    /// Learn from the teacher alone: the data needs no labels.
    #[arg(long)]
    label_free: bool,

    /// The teacher's output to learn from; without it, the first.
    #[arg(long, value_name = "NAME")]
    teacher_output: Option<String>,

    /// An input of the teacher and the student's input that it reads, where their names differ. Repeat for more.
    #[arg(long = "input", value_name = "TEACHER=STUDENT")]
    inputs: Vec<String>,

    /// Bring a value of the student close to one of the teacher; a linear map is learnt where widths differ. Repeat for
    /// more, also of the other kinds below.
    #[arg(long = "match", value_name = "TEACHER=STUDENT")]
    hidden: Vec<String>,

    /// Match where in a picture two features are strong, whatever their numbers of channels.
    #[arg(long, value_name = "TEACHER=STUDENT")]
    match_maps: Vec<String>,

    /// Match attention probabilities.
    #[arg(long, value_name = "TEACHER=STUDENT")]
    match_attention: Vec<String>,

    /// Match how alike the tokens of a sequence are, whatever their widths.
    #[arg(long, value_name = "TEACHER=STUDENT")]
    match_relations: Vec<String>,

    /// What each match counts in the loss.
    #[arg(long, value_name = "WEIGHT", default_value_t = 1.0)]
    match_weight: f32,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let stages = Stages::open(context, &args.data)?;
    let sections = &stages.loaded.recipe.data;
    let train = stages.data("train", &sections.train)?;
    let validation = sections.validation.as_ref().map(|c| stages.data("validation", c)).transpose()?;
    let test = sections.test.as_ref().map(|c| stages.data("test", c)).transpose()?;
    let mut teacher = stages.import(&args.teacher)?;
    let student = match args.student.as_deref() {
        None => stages.network()?,
        Some(name) => match name.strip_prefix("zoo:") {
            None if args.options.is_empty() => stages.import(Path::new(name))?,
            None => return Err(usage("`--option` is for networks of the zoo".to_owned())),
            Some(name) => {
                let entry = model::zoo_entry(name).map_err(|problem| usage(format!("`--student` {problem}")))?;
                let given =
                    args.options.iter().map(|o| model::parse_setting(entry, o)).collect::<Result<Vec<_>, _>>()?;
                stages.of_zoo(entry, &given)?
            }
        },
    };
    let batch = stages.loaded.recipe.train.batch;
    let teaching = teaching(args, &teacher, &student.model.graph, batch)?;
    let trained = stages.train_with(&student, &train, validation.as_ref(), Some(&teaching))?;
    let export = stages.export("export", &trained.network, Some(&train))?;

    // Each on data that none of them learnt from, where it has labels.
    let judged = [("test", test.as_ref()), ("validation", validation.as_ref())];
    let judged = judged.into_iter().find_map(|(split, data)| Some((split, data.filter(|d| has_labels(&stages, d))?)));
    let mut metrics = Map::new();
    let mut text = String::new();
    if let Some((split, data)) = judged {
        rename_inputs(&mut teacher.model.graph, &teaching.distillation, &student.model.graph)?;
        let output = stages.loaded.recipe.train.output.as_deref();
        let rows = [
            ("teacher", &teacher, args.teacher_output.as_deref()),
            ("student_before", &student, output),
            ("student", &trained.network, output),
        ];
        for (name, network, output) in rows {
            let (found, _) = stages.evaluate_output(split, network, data, output)?;
            text.push_str(&show(name, network, &found));
            metrics.insert(name.to_owned(), json!({ "metrics": found, "bytes": network.size_bytes }));
        }
        metrics.insert("split".to_owned(), split.into());
    }
    if let Some(path) = &args.output {
        output::write(path, &stages.store.get(&export.digest)?)?;
    }
    let record = &trained.history.record;
    let elapsed = units::duration_ns(trained.history.elapsed_ns);
    text.push_str(&format!("training        {} of {} steps in {elapsed}\n", record.step, trained.history.steps));
    text.push_str(&format!("model           {}\n", export.digest));
    let json = json!({
        "name": stages.loaded.name, "model_digest": export.digest, "seed": stages.seed, "results": metrics,
        "steps": record.step, "elapsed_ns": trained.history.elapsed_ns, "best": record.best,
        "distillation": teaching.recipe,
        "artifacts": { "teacher": teacher.digest, "network": student.digest, "model": trained.network.digest,
                       "history": trained.history_digest, "export": export.digest },
        "stages": stages.done(),
    });
    Ok(Answer { text, json })
}

fn usage(problem: String) -> Failure {
    Failure::new(Kind::Usage, problem)
}

fn has_labels(stages: &Stages, data: &Data) -> bool {
    let target = &stages.loaded.recipe.train.target;
    data.dataset.facts().tensors.iter().any(|t| t.name == *target)
}

fn show(name: &str, network: &Network, metrics: &Metrics) -> String {
    let answer = match (metrics.accuracy, metrics.perplexity) {
        (_, Some(perplexity)) => format!("perplexity {perplexity:.3}"),
        (Some(accuracy), None) => format!("accuracy {:.2} %", 100.0 * accuracy),
        (None, None) => String::new(),
    };
    let name = name.replace('_', " ");
    format!("{name:<16}{}  loss {:.4}  {answer}\n", units::bytes(network.size_bytes), metrics.loss)
}

/// What the arguments say is to be learnt from the teacher.
fn teaching(args: &Args, teacher: &Network, student: &Graph, batch: usize) -> Result<Teaching, Failure> {
    let graph = &teacher.model.graph;
    let kinds = [
        ("--match", &args.hidden, MatchKind::Hidden),
        ("--match-maps", &args.match_maps, MatchKind::AttentionMaps),
        ("--match-attention", &args.match_attention, MatchKind::AttentionDistributions),
        ("--match-relations", &args.match_relations, MatchKind::Relations),
    ];
    let (mut matches, mut listed) = (Vec::new(), Vec::new());
    for (argument, pairs, kind) in kinds {
        for pair in pairs {
            let (of_teacher, of_student) = split(argument, pair, graph, student)?;
            listed.push(json!([argument.trim_start_matches("--"), of_teacher, of_student, args.match_weight]));
            matches.push(Match { teacher: of_teacher, student: of_student, kind, weight: args.match_weight });
        }
    }
    let inputs: Vec<(String, String)> =
        args.inputs.iter().map(|pair| split("--input", pair, graph, student)).collect::<Result<_, _>>()?;
    let alpha = if args.label_free { 1.0 } else { args.alpha };
    let recipe: Value = json!({
        "alpha": alpha, "temperature": args.temperature, "label_free": args.label_free,
        "output": args.teacher_output, "inputs": inputs, "matches": listed,
    });
    let distillation = Distillation {
        teacher: model::for_batches(graph, batch)?,
        alpha,
        temperature: args.temperature,
        label_free: args.label_free,
        output: args.teacher_output.clone(),
        inputs,
        matches,
    };
    Ok(Teaching { teacher: teacher.digest, distillation, recipe })
}

/// The two names of `TEACHER=STUDENT`, either of which may contain the sign itself.
fn split(argument: &str, pair: &str, teacher: &Graph, student: &Graph) -> Result<(String, String), Failure> {
    let places: Vec<(&str, &str)> = pair.match_indices('=').map(|(at, _)| (&pair[..at], &pair[at + 1..])).collect();
    let known = places.iter().find(|(a, b)| teacher.find(a).is_some() && student.find(b).is_some());
    // What is not known is refused where it is used, with the nearest name.
    match known.or(places.first()) {
        Some((a, b)) => Ok(((*a).to_owned(), (*b).to_owned())),
        None => Err(usage(format!("`{argument} {pair}` is not of the form TEACHER=STUDENT"))),
    }
}

/// Gives the teacher's inputs the names of what they read, by which data finds them.
fn rename_inputs(teacher: &mut Graph, distillation: &Distillation, student: &Graph) -> Result<(), Failure> {
    let (own, theirs) = (model::inputs(teacher), model::inputs(student));
    for input in &own {
        let name = teacher.value(*input).name.clone();
        let stated = distillation.inputs.iter().find(|(from, _)| *from == name).map(|(_, to)| to.clone());
        let to = stated.or_else(|| match (own.as_slice(), theirs.as_slice()) {
            ([_], [only]) => Some(student.value(*only).name.clone()),
            _ => None,
        });
        if let Some(to) = to.filter(|to| *to != name) {
            teacher.rename(*input, &to).map_err(|e| Failure::of(Kind::Input, &e))?;
        }
    }
    Ok(())
}
