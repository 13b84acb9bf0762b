//! `updraft inspect`: what a model is and what it costs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use serde_json::{Value, json};
use updraft_base::units;
use updraft_graph::cost::{self, Cost};
use updraft_graph::op::show_shape;
use updraft_graph::{Graph, ValueId, zoo};

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::model;
use crate::table::table;

/// Show a model: inputs, outputs, operators, parameters, FLOPs and bytes
///
/// Reads any ONNX model, external data beside it included. A multiply-add counts as two FLOPs; bytes are those of each
/// node's operands in memory. Sizes that the model leaves open count as 1 unless `--size` says otherwise.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model.
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// Sets an open size, such as `N=8`. Repeat for more.
    #[arg(long = "size", value_name = "NAME=SIZE")]
    sizes: Vec<String>,

    /// List every node, not only sums by operator.
    #[arg(long)]
    nodes: bool,
}

struct NodeFacts {
    label: String,
    operator: String,
    outputs: String,
    cost: Option<Cost>,
}

pub(crate) fn run(args: &Args, _: &Context) -> Result<Answer, Failure> {
    let loaded = model::load(&args.model)?;
    let graph = &loaded.model.graph;
    let mut sizes = parse_sizes(&args.sizes)?;
    let symbols = cost::input_symbols(graph);
    if let Some(unknown) = sizes.keys().find(|s| !symbols.contains(s)) {
        let known = if symbols.is_empty() { "none".to_owned() } else { symbols.join(", ") };
        return Err(Failure::new(Kind::Usage, format!("the model has no open size `{unknown}`; it has {known}")));
    }
    for symbol in &symbols {
        sizes.entry(symbol.clone()).or_insert(1);
    }
    let bound = cost::at_sizes(graph, &sizes).map_err(|e| Failure::of(Kind::Input, &e).about(&args.model))?;
    let nodes: Vec<NodeFacts> = bound
        .nodes()
        .map(|(_, node)| NodeFacts {
            label: node.label(&bound),
            operator: if node.domain.is_empty() { node.op.clone() } else { format!("{}.{}", node.domain, node.op) },
            outputs: node.outputs.iter().flatten().map(|v| show_value(&bound, *v)).collect::<Vec<_>>().join(", "),
            cost: cost::of_node(&bound, node),
        })
        .collect();
    let total: Cost = nodes.iter().filter_map(|n| n.cost).sum();
    let unknown = nodes.iter().filter(|n| n.cost.is_none()).count();
    let parameters = zoo::parameter_count(graph);
    let constant_bytes: u64 = graph.constants().map(|(_, t)| t.byte_len() as u64).sum();

    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12}{value}");
    };
    line("model", format!("{} ({})", args.model.display(), units::bytes(loaded.size_bytes)));
    line("digest", loaded.digest.to_string());
    line("made by", format!("{} {}", loaded.model.producer_name, loaded.model.producer_version).trim().to_owned());
    let opsets: Vec<String> = graph
        .opsets
        .iter()
        .map(|(domain, version)| format!("{} {version}", if domain.is_empty() { "ai.onnx" } else { domain }))
        .collect();
    line("opsets", opsets.join(", "));
    for (what, values) in [("input", model::inputs(graph)), ("output", graph.outputs().to_vec())] {
        for v in values {
            line(what, format!("{}: {}", graph.value(v).name, show_value(graph, v)));
        }
    }
    line("parameters", format!("{} ({parameters})", units::count(parameters)));
    line("constants", units::bytes(constant_bytes));
    let shown_sizes: Vec<String> = sizes.iter().map(|(name, size)| format!("{name} = {size}")).collect();
    let at = if sizes.is_empty() { String::new() } else { format!(" at {}", shown_sizes.join(", ")) };
    line("FLOPs", format!("{}{at}", units::count(total.flops)));
    line(
        "moved",
        format!("{} read, {} written{at}", units::bytes(total.read_bytes), units::bytes(total.written_bytes)),
    );
    if unknown > 0 {
        line("unknown", format!("{unknown} of {} nodes have no known cost; the sums are without them", nodes.len()));
    }
    text.push('\n');
    let by_operator = by_operator(&nodes);
    let costs = |cost: Option<Cost>| match cost {
        Some(c) => [units::count(c.flops), units::bytes(c.read_bytes), units::bytes(c.written_bytes)],
        None => ["?"; 3].map(str::to_owned),
    };
    text.push_str(&if args.nodes {
        let rows: Vec<Vec<String>> = nodes
            .iter()
            .map(|n| [n.label.clone(), n.outputs.clone()].into_iter().chain(costs(n.cost)).collect())
            .collect();
        table(&["node", "makes", "FLOPs", "read", "written"], &[2, 3, 4], &rows)
    } else {
        let rows: Vec<Vec<String>> = by_operator
            .iter()
            .map(|(operator, (count, cost))| {
                [(*operator).to_owned(), count.to_string()].into_iter().chain(costs(*cost)).collect()
            })
            .collect();
        table(&["operator", "nodes", "FLOPs", "read", "written"], &[1, 2, 3, 4], &rows)
    });

    let value_json = |v: &ValueId| {
        let value = graph.value(*v);
        let shape: Option<Vec<Value>> = value
            .ty
            .shape()
            .map(|shape| shape.iter().map(|d| d.known().map_or_else(|| json!(d.to_string()), |n| json!(n))).collect());
        json!({ "name": value.name, "type": value.ty.dtype().map(|d| d.name()), "shape": shape })
    };
    let cost_json = |cost: Option<Cost>| match cost {
        Some(c) => json!({ "flops": c.flops, "read_bytes": c.read_bytes, "written_bytes": c.written_bytes }),
        None => Value::Null,
    };
    let json = json!({
        "file": args.model,
        "digest": loaded.digest,
        "size_bytes": loaded.size_bytes,
        "producer": { "name": loaded.model.producer_name, "version": loaded.model.producer_version },
        "opsets": graph.opsets,
        "inputs": model::inputs(graph).iter().map(value_json).collect::<Vec<_>>(),
        "outputs": graph.outputs().iter().map(value_json).collect::<Vec<_>>(),
        "parameters": parameters,
        "constant_bytes": constant_bytes,
        "sizes": sizes,
        "total": cost_json(Some(total)),
        "nodes_without_cost": unknown,
        "operators": by_operator.iter().map(|(operator, (count, cost))| {
            json!({ "operator": operator, "nodes": count, "cost": cost_json(*cost) })
        }).collect::<Vec<_>>(),
        "nodes": nodes.iter().map(|n| {
            json!({ "node": n.label, "operator": n.operator, "makes": n.outputs, "cost": cost_json(n.cost) })
        }).collect::<Vec<_>>(),
    });
    Ok(Answer { text, json })
}

/// Nodes and their cost by operator; an operator one of whose nodes has no known cost has none.
fn by_operator(nodes: &[NodeFacts]) -> BTreeMap<&str, (usize, Option<Cost>)> {
    let mut sums: BTreeMap<&str, (usize, Option<Cost>)> = BTreeMap::new();
    for node in nodes {
        let (count, cost) = sums.entry(&node.operator).or_insert((0, Some(Cost::default())));
        *count += 1;
        *cost = cost.zip(node.cost).map(|(a, b)| a + b);
    }
    sums
}

fn show_value(graph: &Graph, value: ValueId) -> String {
    let dtype = graph.dtype(value).map_or("?", |d| d.name());
    match graph.shape(value) {
        Some(shape) => format!("{dtype}{}", show_shape(shape)),
        None => format!("{dtype}[?]"),
    }
}

/// `N=8` for each.
pub(crate) fn parse_sizes(texts: &[String]) -> Result<BTreeMap<String, usize>, Failure> {
    texts
        .iter()
        .map(|text| {
            let (name, size) = text.split_once('=').unzip();
            match (name, size.and_then(|s| s.parse().ok())) {
                (Some(name), Some(size)) => Ok((name.to_owned(), size)),
                _ => Err(Failure::new(Kind::Usage, format!("`{text}` is not of the form NAME=SIZE"))),
            }
        })
        .collect()
}
