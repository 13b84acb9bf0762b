//! `updraft new`: a network of the zoo as an ONNX file.

use std::fmt::Write;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use serde_json::json;
use updraft_base::{Digest, units};
use updraft_graph::{Model, zoo};

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::{model, output};

/// Write a network of the zoo as an ONNX model, with weights drawn at random
///
/// The same network, options and seed give the same bytes.
#[derive(Debug, clap::Args)]
#[command(after_long_help = networks(), after_help = "See --help for the networks and their options.")]
pub struct Args {
    /// The network.
    #[arg(value_parser = PossibleValuesParser::new(zoo::ENTRIES.iter().map(|e| e.name)), hide_possible_values = true)]
    network: String,

    /// Where to write the model.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Sets an option of the network; lists are written `8,16`. Repeat for more.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<String>,
}

/// The zoo, for the manual.
fn networks() -> String {
    let mut text = "Networks and their options:\n".to_owned();
    for entry in zoo::ENTRIES {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {}: {}\n", entry.name, entry.summary);
        for option in entry.options {
            let _ = writeln!(text, "    {}={}  {}", option.name, option.default.setting(), option.meaning);
        }
    }
    text
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let seed = context.seed.unwrap_or(0);
    let entry = model::zoo_entry(&args.network)
        .map_err(|problem| Failure::new(Kind::Usage, format!("the network {problem}")))?;
    let given = args.settings.iter().map(|text| model::parse_setting(entry, text)).collect::<Result<Vec<_>, _>>()?;
    let graph = model::build(entry, &given, seed)?;
    let parameters = zoo::parameter_count(&graph);
    let bytes = model::encode(&Model::new(graph))?;
    output::write(&args.output, &bytes)?;
    let digest = Digest::of(&bytes);
    let text = format!(
        "{}: {}, {} parameters, {}, seed {seed}\n{digest}\n",
        args.output.display(),
        entry.name,
        units::count(parameters),
        units::bytes(bytes.len() as u64),
    );
    let json = json!({
        "network": entry.name, "file": args.output, "digest": digest, "parameters": parameters,
        "size_bytes": bytes.len(), "seed": seed,
    });
    Ok(Answer { text, json })
}
