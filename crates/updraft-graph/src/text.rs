//! The text form of a graph, for tests, diffs and people: one line for each input, initializer, node and output.
//!
//! ```text
//! graph layer opset 21 {
//!   input x: f32[N, 2]
//!   const w = f32[2, 3] {1.0, 0.0, 0.5, 0.0, 1.0, -1.0}
//!   const big = f32[512, 512] #5f70bf18a0860070
//!   h: f32[N, 3] = MatMul(x, w)
//!   y: f32[N, 3] = ai.example::Scale<by = 2.0, axes = [0, 1]>(h, _) @ layer/scale
//!   output y
//! }
//! ```
//!
//! Lines come in the graph's sorted order ([`Graph::sort`]), so equal graphs have equal texts. Large initializers are
//! named by the beginning of their digest ([`tensor_key`]): the text stays short and still changes with every weight;
//! reading such a text takes a source of tensors by that name. Documentation, metadata and other notes that files
//! carry along are left out. `_` stands for an operand that is left out, `?` for an unknown element type or size and
//! `[*]` for an unknown rank; `outer` values belong to the graph around a subgraph. Names are quoted as Rust quotes
//! strings where they hold anything but letters, digits, `_`, `.` and `/`.

mod element;
mod parse;
mod print;

use updraft_base::digest::Hasher;

use crate::graph::Graph;
use crate::onnx::to_little_endian;
use crate::tensor::Tensor;

pub use parse::{TextError, parse, parse_with};
pub(crate) use print::show_type;
pub use print::{print, print_model};

/// Tensors of at most this many elements stand in the text; more would not fit a line.
const INLINE_ELEMENTS_MAX: usize = 16;

/// Graphs within graphs, and types within types; more than the ONNX format can nest.
const DEPTH_MAX: usize = 64;

/// Words that cannot be bare names because a line can begin with them.
const KEYWORDS: [&str; 7] = ["_", "input", "const", "sparse", "outer", "undefined", "output"];

/// What a large tensor is called in a text: the first 16 hexadecimal digits of the SHA-256 digest of its type, shape
/// and elements.
pub fn tensor_key(tensor: &Tensor) -> String {
    let mut hasher = Hasher::new();
    hash_tensor(tensor, &mut hasher);
    hasher.finish().hex()[..16].to_owned()
}

/// Feeds type, shape and elements, the same on every machine.
pub(crate) fn hash_tensor(tensor: &Tensor, hasher: &mut Hasher) {
    hasher.field(tensor.dtype().name().as_bytes());
    hasher.update(&(tensor.rank() as u64).to_le_bytes());
    for size in tensor.shape() {
        hasher.update(&(*size as u64).to_le_bytes());
    }
    match tensor.strings() {
        Ok(strings) => strings.iter().for_each(|s| hasher.field(s)),
        Err(_) => hasher.field(&to_little_endian(tensor)),
    }
}

/// Whether a name is written without quotes.
fn is_bare(name: &str) -> bool {
    !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/'))
        && !KEYWORDS.contains(&name)
}

/// A source of tensors for [`parse_with`]: the initializers and attributes of a graph, its subgraphs included.
pub fn tensors_of(graph: &Graph) -> std::collections::HashMap<String, Tensor> {
    let mut out = std::collections::HashMap::new();
    collect_tensors(graph, &mut out);
    out
}

fn collect_tensors(graph: &Graph, out: &mut std::collections::HashMap<String, Tensor>) {
    use crate::attribute::Attribute;
    let mut add = |tensor: &Tensor| {
        if tensor.len() > INLINE_ELEMENTS_MAX {
            out.insert(tensor_key(tensor), tensor.clone());
        }
    };
    graph.constants().for_each(|(_, tensor)| add(tensor));
    let mut subgraphs: Vec<&Graph> = Vec::new();
    for (_, attribute) in graph.nodes().flat_map(|(_, node)| node.attributes.iter()) {
        match attribute {
            Attribute::Tensor(t) => add(t),
            Attribute::Tensors(list) => list.iter().for_each(&mut add),
            Attribute::SparseTensor(s) => [&s.values, &s.indices].into_iter().for_each(&mut add),
            Attribute::SparseTensors(list) => list.iter().flat_map(|s| [&s.values, &s.indices]).for_each(&mut add),
            Attribute::Graph(g) => subgraphs.push(g),
            Attribute::Graphs(list) => subgraphs.extend(list),
            _ => {}
        }
    }
    subgraphs.into_iter().for_each(|g| collect_tensors(g, out));
}
