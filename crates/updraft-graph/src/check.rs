//! The checker: everything that must hold of a graph before anyone rewrites or runs it.
//!
//! All problems are reported, not only the first, and each names the node or value it is about. Types and shapes are
//! checked by working them out again from the inputs and meeting the result with what is declared.

use std::collections::{HashMap, HashSet};
use std::fmt;

use updraft_base::nearest;

use crate::attribute::Attribute;
use crate::graph::{Graph, GraphError, Node, OPSET_MAX, UPDRAFT_DOMAIN, ValueType};
use crate::infer::infer_node;
use crate::model::{Function, Model};
use crate::op::{self, OpError};

/// One thing that does not hold.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Problem {
    /// No such operator, and no function of the model of that name.
    #[error("{graph}: node {node}: operator {op} of domain {domain:?} is not known{}", did_you_mean(.nearest))]
    UnknownOperator {
        /// The graph it is in.
        graph: String,
        /// The node's label.
        node: String,
        /// Domain of the operator.
        domain: String,
        /// Name of the operator.
        op: String,
        /// The known operator whose name is closest.
        nearest: Option<String>,
    },
    /// The graph does not say in which version of an operator set a node is written, or says one that is not known.
    #[error("{graph}: operator set {domain:?} has {}, expected {expected}", show_version(.found))]
    Opset {
        /// The graph.
        graph: String,
        /// The operator set.
        domain: String,
        /// The version that the graph states.
        found: Option<u32>,
        /// Versions that are known.
        expected: String,
    },
    /// A value is read that nothing makes.
    #[error("{graph}: {reader} reads {value:?}, which nothing makes")]
    Undefined {
        /// The graph it is in.
        graph: String,
        /// The node, or the list of outputs.
        reader: String,
        /// The value's name.
        value: String,
    },
    /// A value comes from two places.
    #[error("{graph}: {value:?} is {first} and also {second}")]
    TwoSources {
        /// The graph it is in.
        graph: String,
        /// The value's name.
        value: String,
        /// One source.
        first: String,
        /// The other.
        second: String,
    },
    /// The operator cannot take its operands or attributes, or makes something else than is declared.
    #[error("{graph}: node {node}: {source}")]
    Node {
        /// The graph it is in.
        graph: String,
        /// The node's label.
        node: String,
        /// What is wrong.
        source: OpError,
    },
    /// Nodes wait for one another.
    #[error("{graph}: {source}")]
    Order {
        /// The graph.
        graph: String,
        /// The nodes.
        source: GraphError,
    },
    /// The graph has no outputs, so that nothing of it would run.
    #[error("{graph}: there are no outputs")]
    NoOutputs {
        /// The graph.
        graph: String,
    },
}

/// All problems of a graph, as one error.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckError {
    /// At least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            write!(f, "{}{problem}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for CheckError {}

/// Checks a graph.
pub fn check(graph: &Graph) -> Result<(), CheckError> {
    finish(Checker::new(&[]).run(graph))
}

/// Checks a model: its graph and its functions, which the graph may use as operators.
pub fn check_model(model: &Model) -> Result<(), CheckError> {
    let mut checker = Checker::new(&model.functions);
    let mut problems = checker.run(&model.graph);
    for function in &model.functions {
        problems.extend(checker.run(&function.body));
    }
    finish(problems)
}

fn finish(problems: Vec<Problem>) -> Result<(), CheckError> {
    if problems.is_empty() { Ok(()) } else { Err(CheckError { problems }) }
}

struct Checker {
    functions: HashSet<(String, String, String)>,
    problems: Vec<Problem>,
}

impl Checker {
    fn new(functions: &[Function]) -> Checker {
        let key = |f: &Function| (f.domain.clone(), f.body.name.clone(), f.overload.clone());
        Checker { functions: functions.iter().map(key).collect(), problems: Vec::new() }
    }

    fn run(&mut self, graph: &Graph) -> Vec<Problem> {
        self.graph(graph, &HashMap::new());
        std::mem::take(&mut self.problems)
    }

    /// `outer` are the values of the graphs around this one.
    fn graph(&mut self, graph: &Graph, outer: &HashMap<&str, &ValueType>) {
        let place = format!("graph {:?}", graph.name);
        if graph.outputs().is_empty() {
            self.problems.push(Problem::NoOutputs { graph: place.clone() });
        }
        let unknown_sets = self.opsets(graph, &place);
        self.sources(graph, &place, outer);

        let order = match graph.order() {
            Ok(order) => order,
            Err(source) => {
                self.problems.push(Problem::Order { graph: place, source });
                return;
            }
        };
        let mut typed = graph.clone();
        for (id, value) in graph.values().filter(|(_, v)| v.is_outer()) {
            if let Some(ty) = outer.get(value.name.as_str()) {
                typed.set_type(id, (*ty).clone());
            }
        }
        for id in order {
            let node = graph.node(id);
            // Without a version there is no telling what a node should be.
            if !unknown_sets.contains(&node.domain)
                && self.operator(graph, node, &place)
                && let Err(source) = infer_node(&mut typed, id)
            {
                self.problems.push(Problem::Node { graph: place.clone(), node: node.label(graph), source });
            }
        }
        for (_, node) in graph.nodes() {
            let subgraphs = node.attributes.iter().flat_map(|(_, attribute)| match attribute {
                Attribute::Graph(inner) => std::slice::from_ref(&**inner),
                Attribute::Graphs(inner) => inner,
                _ => &[],
            });
            for subgraph in subgraphs {
                let mut sight = outer.clone();
                sight.extend(typed.values().map(|(_, v)| (v.name.as_str(), &v.ty)));
                self.graph(subgraph, &sight);
            }
        }
    }

    /// Reports, and returns, the domains without a known version.
    fn opsets(&mut self, graph: &Graph, place: &str) -> HashSet<String> {
        let mut unknown = HashSet::new();
        let mut domains: Vec<&str> = graph.nodes().map(|(_, node)| node.domain.as_str()).collect();
        domains.extend(graph.opsets.keys().map(String::as_str));
        domains.sort_unstable();
        domains.dedup();
        for domain in domains {
            let found = graph.opset(domain);
            let known = match domain {
                "" | "ai.onnx" => 7..=OPSET_MAX,
                UPDRAFT_DOMAIN => 1..=1,
                _ => 1..=u32::MAX,
            };
            if !found.is_some_and(|v| known.contains(&v)) {
                unknown.insert(domain.to_owned());
                self.problems.push(Problem::Opset {
                    graph: place.to_owned(),
                    domain: domain.to_owned(),
                    found,
                    expected: match *known.end() {
                        u32::MAX => "one of at least 1".to_owned(),
                        end => format!("{} to {end}", known.start()),
                    },
                });
            }
        }
        unknown
    }

    /// Each value that is read comes from exactly one place.
    fn sources(&mut self, graph: &Graph, place: &str, outer: &HashMap<&str, &ValueType>) {
        let inputs: HashSet<_> = graph.inputs().iter().copied().collect();
        let mut made = HashMap::new();
        for (_, node) in graph.nodes() {
            for value in node.outputs.iter().flatten() {
                let label = || format!("made by {}", node.label(graph));
                let first = if let Some(first) = made.insert(*value, label()) {
                    Some(first)
                } else if inputs.contains(value) {
                    Some("an input".to_owned())
                } else if graph.value(*value).constant().is_some() {
                    Some("an initializer".to_owned())
                } else if graph.value(*value).is_outer() {
                    Some("a value of the graph around".to_owned())
                } else {
                    None
                };
                if let Some(first) = first {
                    let value = graph.value(*value).name.clone();
                    self.problems.push(Problem::TwoSources { graph: place.to_owned(), value, first, second: label() });
                }
            }
        }
        let is_defined = |id| {
            let value = graph.value(id);
            inputs.contains(&id)
                || value.constant().is_some()
                || made.contains_key(&id)
                || (value.is_outer() && outer.contains_key(value.name.as_str()))
        };
        let of_nodes = graph.nodes().flat_map(|(_, node)| {
            node.inputs.iter().flatten().map(move |v| (format!("node {}", node.label(graph)), *v))
        });
        let of_outputs = graph.outputs().iter().map(|v| ("the list of outputs".to_owned(), *v));
        for (reader, value) in of_nodes.chain(of_outputs).filter(|(_, v)| !is_defined(*v)) {
            let value = graph.value(value).name.clone();
            self.problems.push(Problem::Undefined { graph: place.to_owned(), reader, value });
        }
    }

    /// Whether the node's operator is in the table, so that its rules can be asked.
    fn operator(&mut self, graph: &Graph, node: &Node, place: &str) -> bool {
        if self.functions.contains(&(node.domain.clone(), node.op.clone(), node.overload.clone())) {
            return false;
        }
        if op::find(&node.domain, &node.op).is_none() {
            let names: Vec<&str> = op::table().filter(|o| o.domain == node.domain).map(|o| o.name).collect();
            self.problems.push(Problem::UnknownOperator {
                graph: place.to_owned(),
                node: node.label(graph),
                domain: node.domain.clone(),
                op: node.op.clone(),
                nearest: nearest(&node.op, names).map(str::to_owned),
            });
            return false;
        }
        match op::of_node(graph, node) {
            Ok(_) => true,
            Err(source) => {
                self.problems.push(Problem::Node { graph: place.to_owned(), node: node.label(graph), source });
                false
            }
        }
    }
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or(String::new(), |name| format!("; the nearest is {name}"))
}

fn show_version(found: &Option<u32>) -> String {
    found.map_or("no version".to_owned(), |v| format!("version {v}"))
}
