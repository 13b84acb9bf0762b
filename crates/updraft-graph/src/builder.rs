//! Building graphs from Rust: each call adds one node and works out what it makes at once.
//!
//! ```
//! use updraft_graph::{DType, Graph, Tensor, ValueType};
//! let mut g = Graph::new("layer");
//! let x = g.add_input("x", ValueType::tensor(DType::F32, vec!["N".into(), 2.into()]))?;
//! let w = g.add_constant("w", Tensor::new(&[2, 3], &[0f32; 6])?);
//! let y = g.op("MatMul", &[x, w], [])?;
//! let y = g.op("Relu", &[y], [])?;
//! g.push_output(y);
//! assert_eq!(updraft_graph::op::show_shape(g.shape(y).unwrap()), "[N, 3]");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::attribute::Attributes;
use crate::graph::{Graph, Node, UPDRAFT_DOMAIN, ValueId, ValueType};
use crate::infer::infer_node;
use crate::op::OpError;

impl Graph {
    /// Adds a node of ONNX's operator set with one output and returns that.
    pub fn op(&mut self, op: &str, inputs: &[ValueId], attributes: impl Into<Attributes>) -> Result<ValueId, OpError> {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        Ok(self.op_n("", op, &inputs, attributes, 1)?[0])
    }

    /// Adds a node of our own operator set with one output and returns that.
    pub fn own_op(
        &mut self,
        op: &str,
        inputs: &[ValueId],
        attributes: impl Into<Attributes>,
    ) -> Result<ValueId, OpError> {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        Ok(self.op_n(UPDRAFT_DOMAIN, op, &inputs, attributes, 1)?[0])
    }

    /// Adds a node with any operands and returns its `outputs` outputs, types and shapes worked out.
    pub fn op_n(
        &mut self,
        domain: &str,
        op: &str,
        inputs: &[Option<ValueId>],
        attributes: impl Into<Attributes>,
        outputs: usize,
    ) -> Result<Vec<ValueId>, OpError> {
        let made: Vec<ValueId> = (0..outputs).map(|_| self.fresh_value(op, ValueType::Unknown)).collect();
        let node = Node {
            domain: domain.to_owned(),
            op: op.to_owned(),
            inputs: inputs.to_vec(),
            outputs: made.iter().copied().map(Some).collect(),
            attributes: attributes.into(),
            ..Node::default()
        };
        let id = self.add_node(node)?;
        infer_node(self, id)
            .map_err(|source| OpError::Inner { node: self.node(id).label(self), source: Box::new(source) })?;
        Ok(made)
    }
}
