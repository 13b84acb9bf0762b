//! Einsum: sums of products over named axes, and Det.
//!
//! An equation names every axis of every operand; axes with one name run together, and names that the output lacks are
//! summed over. An ellipsis stands for axes that broadcast, which get names of their own here.

use std::collections::BTreeMap;

use crate::dim::{Dim, dims, known_shape};
use crate::graph::ValueId;
use crate::op::index::{Positions, checked_count, signed_strides};
use crate::op::{Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Shapes, filled, show_shape};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Einsum", &[12, 28], Arity::range(1, usize::MAX), infer_einsum, eval_einsum)
        .gradient(einsum_gradient)
        .flops(einsum_flops)
        .channels(einsum_links),
    Op::onnx("Det", &[11, 22], Arity::exact(1), infer_det, eval_det)
        .no_gradient("no layer of a network is a determinant")
        .flops(det_flops)
        .no_channels("all of a matrix makes one number"),
];

/// The name of an axis: a letter, or a place in the ellipsis counted from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Ellipsis(usize),
    Letter(char),
}

/// An equation with the names of each operand's axes and of the output's.
#[derive(Debug, Clone, PartialEq)]
struct Equation {
    operands: Vec<Vec<Label>>,
    output: Vec<Label>,
}

impl Equation {
    /// Reads `"ij,jk->ik"` for operands of these ranks.
    fn parse(text: &str, ranks: &[usize]) -> Result<Equation, OpError> {
        let refuse = |problem: &str| OpError::attribute("equation", format!("is {text:?}: {problem}"));
        let compact: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let (left, right) = match compact.split_once("->") {
            Some((left, right)) => (left, Some(right)),
            None => (compact.as_str(), None),
        };
        let terms: Vec<&str> = left.split(',').collect();
        if terms.len() != ranks.len() {
            return Err(refuse(&format!("{} terms for {} operands", terms.len(), ranks.len())));
        }
        let mut widest = 0;
        let mut operands = Vec::new();
        for (term, rank) in terms.iter().zip(ranks) {
            let letters = term.replacen("...", "", 1).chars().count();
            let hidden = match term.contains("...") {
                true => rank.checked_sub(letters),
                false if letters == *rank => Some(0),
                false => None,
            };
            let hidden = hidden.ok_or_else(|| refuse(&format!("term {term:?} for an operand of rank {rank}")))?;
            widest = widest.max(hidden);
            operands.push(labels(term, hidden).ok_or_else(|| refuse("names are letters"))?);
        }
        let output = match right {
            Some(right) => labels(right, widest).ok_or_else(|| refuse("names are letters"))?,
            None => {
                // Without an output, it is the ellipsis and the names that occur once, in alphabetical order.
                let mut counts = BTreeMap::new();
                operands.iter().flatten().for_each(|label| *counts.entry(*label).or_insert(0) += 1);
                let letters = counts.iter().filter(|(l, n)| matches!(l, Label::Letter(_)) && **n == 1).map(|(l, _)| *l);
                (0..widest).rev().map(Label::Ellipsis).chain(letters).collect()
            }
        };
        let known = |label: &Label| operands.iter().flatten().any(|l| l == label);
        if output.iter().any(|l| matches!(l, Label::Letter(_)) && !known(l)) {
            return Err(refuse("the output names an axis that no operand has"));
        }
        if output.iter().enumerate().any(|(i, l)| output[..i].contains(l)) {
            return Err(refuse("the output names an axis twice"));
        }
        Ok(Equation { operands, output })
    }

    /// The size of each axis. Axes of size 1 in an ellipsis broadcast.
    fn sizes(&self, shapes: &[&[Dim]]) -> Result<BTreeMap<Label, Dim>, OpError> {
        let mut sizes: BTreeMap<Label, Dim> = BTreeMap::new();
        for (labels, shape) in self.operands.iter().zip(shapes) {
            for (label, dim) in labels.iter().zip(*shape) {
                match sizes.get(label) {
                    None | Some(Dim::Unknown) => drop(sizes.insert(*label, dim.clone())),
                    Some(Dim::Known(1)) => drop(sizes.insert(*label, dim.clone())),
                    Some(known) if *dim != Dim::Known(1) && known.differs(dim) => {
                        let shown: Vec<String> = shapes.iter().map(|s| show_shape(s)).collect();
                        let message = format!("one axis has sizes {known} and {dim} in {}", shown.join(", "));
                        return Err(OpError::shape(message));
                    }
                    Some(known) => {
                        if let (Dim::Expr(_), Dim::Known(_)) = (known, dim) {
                            sizes.insert(*label, dim.clone());
                        }
                    }
                }
            }
        }
        Ok(sizes)
    }
}

fn labels(term: &str, hidden: usize) -> Option<Vec<Label>> {
    let mut out = Vec::new();
    let (before, after) = match term.split_once("...") {
        Some((before, after)) => (before, Some(after)),
        None => (term, None),
    };
    let letters = |text: &str| {
        text.chars().map(|c| c.is_ascii_alphabetic().then_some(Label::Letter(c))).collect::<Option<Vec<_>>>()
    };
    out.extend(letters(before)?);
    if let Some(after) = after {
        out.extend((0..hidden).rev().map(Label::Ellipsis));
        out.extend(letters(after)?);
    }
    Some(out)
}

/// An equation and the shapes of its operands.
type Stated<'a> = (Equation, Vec<&'a [Dim]>);

/// The node's equation, if all ranks are known.
fn equation_of<'a>(cx: &'a Infer) -> Result<Option<Stated<'a>>, OpError> {
    let text = cx.attributes().string("equation", "")?;
    let Some(shapes) = (0..cx.inputs.len()).map(|i| cx.shape(i)).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let ranks: Vec<usize> = shapes.iter().map(|s| s.len()).collect();
    Ok(Some((Equation::parse(text, &ranks)?, shapes)))
}

fn infer_einsum(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.dtype(0);
    let Some((equation, shapes)) = equation_of(cx)? else { return Ok(vec![Fact::of_dtype(dtype)]) };
    let sizes = equation.sizes(&shapes)?;
    let shape = equation.output.iter().map(|label| sizes.get(label).cloned().unwrap_or(Dim::Known(1)));
    Ok(vec![Fact::tensor(dtype, shape.collect())])
}

fn eval_einsum(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let operands = (0..cx.inputs.len()).map(|i| cx.input(i)).collect::<Result<Vec<_>, _>>()?;
    let shapes: Vec<Vec<Dim>> = operands.iter().map(|t| dims(t.shape())).collect();
    let shapes: Vec<&[Dim]> = shapes.iter().map(Vec::as_slice).collect();
    let ranks: Vec<usize> = operands.iter().map(|t| t.rank()).collect();
    let equation = Equation::parse(cx.attributes().string("equation", "")?, &ranks)?;
    let sizes = equation.sizes(&shapes)?;
    let mut walk: Vec<Label> = equation.output.clone();
    walk.extend(sizes.keys().filter(|label| !equation.output.contains(label)));
    let lengths: Vec<Dim> = walk.iter().map(|l| sizes.get(l).cloned().unwrap_or(Dim::Known(1))).collect();
    let lengths = known_shape(&lengths).ok_or_else(|| OpError::shape("axes of unknown size"))?;
    checked_count(&lengths)?;
    let shape = &lengths[..equation.output.len()];
    let mut positions: Vec<Positions> = equation
        .operands
        .iter()
        .zip(&operands)
        .map(|(labels, tensor)| {
            // An axis named twice moves along both at once: the diagonal.
            let steps: Vec<isize> = walk
                .iter()
                .map(|label| {
                    let own = labels.iter().zip(tensor.shape()).zip(signed_strides(tensor.shape()));
                    own.filter(|((l, size), _)| *l == label && **size != 1).map(|(_, stride)| stride).sum()
                })
                .collect();
            Positions::new(&lengths, &steps, 0)
        })
        .collect();
    let dtype = operands[0].dtype();
    if operands.iter().any(|t| t.dtype() != dtype) {
        return Err(OpError::dtype("operands of different types"));
    }
    let summed: usize = lengths[equation.output.len()..].iter().product();
    let mut out = filled(shape, 0.0)?;
    let values = operands.iter().map(|t| t.to_f64()).collect::<Result<Vec<_>, _>>()?;
    for sum in &mut out {
        for _ in 0..summed {
            let mut product = 1.0;
            for (positions, values) in positions.iter_mut().zip(&values) {
                product *= positions.next().map_or(0.0, |at| values[at]);
            }
            *sum += product;
        }
    }
    Ok(vec![Tensor::from_f64(dtype, shape, &out)?])
}

/// The gradient of an operand is the same sum of products with the output's gradient in the operand's place and the
/// operand's axes as output.
fn einsum_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let text = cx.node.attributes.string("equation", "")?.to_owned();
    let operands = (0..cx.node.inputs.len()).map(|i| cx.input(i)).collect::<Result<Vec<_>, _>>()?;
    let ranks = operands.iter().map(|v| Ok(cx.shape(*v)?.len())).collect::<Result<Vec<_>, OpError>>()?;
    let equation = Equation::parse(&text, &ranks)?;
    let repeated = |labels: &[Label]| labels.iter().enumerate().any(|(i, l)| labels[..i].contains(l));
    if text.contains("...") || equation.operands.iter().any(|labels| repeated(labels)) {
        return Err(OpError::unsupported(format!("gradient of Einsum {text:?}, which broadcasts or takes a diagonal")));
    }
    let write = |labels: &[Label]| -> String {
        labels.iter().filter_map(|l| if let Label::Letter(c) = l { Some(*c) } else { None }).collect()
    };
    let dy = cx.grad()?;
    let mut found = Vec::new();
    for (index, own) in equation.operands.iter().enumerate() {
        if !cx.wants(index) {
            found.push(None);
            continue;
        }
        let others: Vec<usize> = (0..operands.len()).filter(|i| *i != index).collect();
        let elsewhere =
            |l: &Label| equation.output.contains(l) || others.iter().any(|i| equation.operands[*i].contains(l));
        // An axis that only this operand has was summed over: every element along it gets the same.
        let (kept, summed): (Vec<Label>, Vec<Label>) = own.iter().partition(|l| elsewhere(l));
        let mut terms = vec![write(&equation.output)];
        terms.extend(others.iter().map(|i| write(&equation.operands[*i])));
        let back = format!("{}->{}", terms.join(","), write(&kept));
        let inputs: Vec<ValueId> = std::iter::once(dy).chain(others.iter().map(|i| operands[*i])).collect();
        let mut gradient = cx.op_with("Einsum", &inputs, [("equation", back.as_str().into())])?;
        if !summed.is_empty() {
            let axes: Vec<i64> = (0..own.len()).filter(|i| summed.contains(&own[*i])).map(|i| i as i64).collect();
            let axes = cx.graph.add_constant("axes", Tensor::vector(&axes));
            gradient = cx.op("Unsqueeze", &[gradient, axes])?;
            let shape = cx.op("Shape", &[operands[index]])?;
            gradient = cx.op("Expand", &[gradient, shape])?;
        }
        found.push(Some(gradient));
    }
    Ok(found)
}

/// A multiplication for each operand but the first, and an addition, for each combination of all axes.
fn einsum_flops(shapes: &Shapes) -> u64 {
    let known: Option<Vec<Vec<Dim>>> = shapes.inputs.iter().map(|i| i.as_ref().map(|(_, s)| dims(s))).collect();
    let (Some(known), Ok(text)) = (known, shapes.attributes.string("equation", "")) else { return 0 };
    let ranks: Vec<usize> = known.iter().map(Vec::len).collect();
    let slices: Vec<&[Dim]> = known.iter().map(Vec::as_slice).collect();
    let Ok(sizes) = Equation::parse(text, &ranks).and_then(|e| e.sizes(&slices)) else { return 0 };
    let all = sizes.values().filter_map(Dim::known).fold(1u64, |n, d| n.saturating_mul(d as u64));
    all.saturating_mul(known.len() as u64)
}

fn einsum_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let (equation, shapes) =
        equation_of(cx)?.ok_or_else(|| OpError::shape("the ranks of all operands must be known"))?;
    let sizes = equation.sizes(&shapes)?;
    let mut first: BTreeMap<Label, Axis> =
        equation.output.iter().enumerate().map(|(i, label)| (*label, Axis::Output(0, i))).collect();
    let mut links = Vec::new();
    for (operand, labels) in equation.operands.iter().enumerate() {
        for (axis, label) in labels.iter().enumerate() {
            if !sizes.get(label).is_some_and(|size| size.same(&shapes[operand][axis])) {
                continue;
            }
            let here = Axis::Input(operand, axis);
            match first.get(label) {
                Some(other) => links.push(Link::Same(here, *other)),
                None => drop(first.insert(*label, here)),
            }
        }
    }
    Ok(links)
}

fn infer_det(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "matrices")?;
    let shape = match x.shape.as_deref() {
        None => None,
        Some([batch @ .., m, n]) if !m.differs(n) => Some(batch.to_vec()),
        Some(other) => return Err(OpError::shape(format!("matrices {}, expected square ones", show_shape(other)))),
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }])
}

/// Gaussian elimination with the largest pivot of each column.
fn eval_det(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let [batch @ .., m, n] = x.shape() else {
        return Err(OpError::shape(format!("matrices {:?}, expected rank 2 or more", x.shape())));
    };
    if m != n {
        return Err(OpError::shape(format!("matrices {:?}, expected square ones", x.shape())));
    }
    let n = *n;
    let mut values = x.to_f64()?;
    let count: usize = batch.iter().product();
    let mut found = Vec::with_capacity(count);
    for matrix in 0..count {
        let a = &mut values[matrix * n * n..(matrix + 1) * n * n];
        let mut product = 1.0;
        for column in 0..n {
            let pivot = (column..n).fold(column, |best, row| {
                if a[row * n + column].abs() > a[best * n + column].abs() { row } else { best }
            });
            if pivot != column {
                (0..n).for_each(|j| a.swap(pivot * n + j, column * n + j));
                product = -product;
            }
            let diagonal = a[column * n + column];
            product *= diagonal;
            if diagonal == 0.0 {
                break;
            }
            for row in column + 1..n {
                let factor = a[row * n + column] / diagonal;
                (column..n).for_each(|j| a[row * n + j] -= factor * a[column * n + j]);
            }
        }
        found.push(product);
    }
    Ok(vec![Tensor::from_f64(x.dtype(), batch, &found)?])
}

/// Two thirds of the cube of a matrix's size.
fn det_flops(shapes: &Shapes) -> u64 {
    let size = shapes.inputs.first().and_then(Option::as_ref).and_then(|(_, s)| s.last()).map_or(0, |n| *n as u64);
    shapes.input_len(0).saturating_mul(2 * size) / 3
}
