//! `updraft infer`: a model's outputs for given inputs.

use std::path::PathBuf;

use serde_json::json;
use updraft_data::{read_npz, write_npz};
use updraft_graph::op::show_shape;

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::model;

/// Run a model on arrays from a NumPy file
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model.
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// A `.npz` file with an array for each input, named as the model names it.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,

    /// Where to write a `.npz` file with an array for each output.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let loaded = model::load(&args.model)?;
    let graph = &loaded.model.graph;
    // The user's own file on the user's own machine: as large as memory allows.
    let arrays = read_npz(&args.input, u64::MAX)?;
    let inputs = model::inputs(graph);
    let names: Vec<&str> = graph.inputs().iter().map(|v| graph.value(*v).name.as_str()).collect();
    let file = args.input.display();
    if let Some((unknown, _)) = arrays.iter().find(|(name, _)| !names.contains(&name.as_str())) {
        let near = updraft_base::nearest(unknown, names.iter().copied());
        let near = near.map(|n| format!(", did you mean `{n}`?")).unwrap_or_default();
        let message = format!("{file}: the model has no input `{unknown}`{near}; it has {}", names.join(", "));
        return Err(Failure::new(Kind::Input, message));
    }
    for input in inputs {
        let value = graph.value(input);
        let Some((_, array)) = arrays.iter().find(|(name, _)| *name == value.name) else {
            let shape = value.ty.shape().map(show_shape).unwrap_or_default();
            let dtype = value.ty.dtype().map_or("any", |d| d.name());
            let message = format!("{file}: input `{}` ({dtype}{shape}) is missing", value.name);
            return Err(Failure::new(Kind::Input, message));
        };
        if let Some(expected) = value.ty.dtype().filter(|d| *d != array.dtype()) {
            let message = format!("{file}: input `{}` holds {}, the model takes {expected}", value.name, array.dtype());
            return Err(Failure::new(Kind::Input, message));
        }
    }
    let mut session = model::compile(graph, context.threads)?;
    let given: Vec<_> = arrays.iter().map(|(name, array)| (name.as_str(), array)).collect();
    let outputs = session.run(&given)?;
    let named: Vec<_> = graph.outputs().iter().map(|v| graph.value(*v).name.clone()).zip(outputs).collect();
    write_npz(&args.output, &named)?;
    let mut text = String::new();
    for (name, tensor) in &named {
        text.push_str(&format!("{name}: {}{:?}\n", tensor.dtype(), tensor.shape()));
    }
    let shown: Vec<_> =
        named.iter().map(|(name, t)| json!({ "name": name, "type": t.dtype().name(), "shape": t.shape() })).collect();
    Ok(Answer { text, json: json!({ "file": args.output, "outputs": shown }) })
}
