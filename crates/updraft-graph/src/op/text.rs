//! Operators on strings. ONNX strings are bytes; what splits or changes case here takes them as UTF-8.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::op::elementwise::{binary, operands};
use crate::op::index::broadcast_positions;
use crate::op::{Arity, Eval, Fact, Infer, Op, OpError, OpView};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;

const TEXT: &str = "strings have no derivative";

/// The family.
pub(super) const OPS: &[Op] = &[
    binary("StringConcat", &[20], eval_concat).flops(crate::op::no_flops).no_gradient(TEXT),
    Op::onnx("StringSplit", &[20], Arity::exact(1).outputs(2, 2), infer_split, eval_split)
        .no_gradient(TEXT)
        .no_channels("each string becomes a list"),
    Op::onnx("StringNormalizer", &[10], Arity::exact(1), infer_normalizer, eval_normalizer)
        .no_gradient(TEXT)
        .no_channels("what is left out depends on the content"),
];

fn eval_concat(cx: &Eval) -> Evaluated {
    let (a, b, shape) = operands(cx)?;
    let (x, y) = (a.strings()?, b.strings()?);
    let pairs = broadcast_positions(a.shape(), &shape).zip(broadcast_positions(b.shape(), &shape));
    let joined = pairs.map(|(i, j)| [x[i].as_slice(), &y[j]].concat()).collect();
    Ok(vec![Tensor::from_strings(&shape, joined)?])
}

/// The parts get an axis of their own; the second output counts them.
fn infer_split(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let shape = cx.shape(0).map(<[Dim]>::to_vec);
    let parts = shape.clone().map(|shape| [shape, vec![Dim::Unknown]].concat());
    let fact = |dtype, shape| Fact { dtype: Some(dtype), shape, content: None };
    Ok(vec![fact(DType::String, parts), fact(DType::I64, shape)])
}

fn utf8(text: &[u8]) -> Result<&str, OpError> {
    std::str::from_utf8(text).map_err(|_| OpError::value(format!("{:?} is not UTF-8", String::from_utf8_lossy(text))))
}

/// At most `splits_max` splits from the left; runs of white space count as one delimiter where none is given.
fn split<'a>(text: &'a str, delimiter: &str, splits_max: usize) -> Vec<&'a str> {
    if !delimiter.is_empty() {
        return text.splitn(splits_max.saturating_add(1), delimiter).collect();
    }
    let mut parts = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        match rest.find(char::is_whitespace).filter(|_| parts.len() < splits_max) {
            Some(end) => {
                parts.push(&rest[..end]);
                rest = rest[end..].trim_start();
            }
            None => {
                parts.push(rest);
                break;
            }
        }
    }
    parts
}

/// Lists shorter than the longest are filled up with empty strings.
fn eval_split(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let delimiter = cx.attributes().string("delimiter", "")?;
    let splits_max = match cx.attributes().optional_int("maxsplit")? {
        Some(n) => usize::try_from(n).map_err(|_| OpError::attribute("maxsplit", format!("is {n}")))?,
        None => usize::MAX,
    };
    let lists: Vec<Vec<&str>> = x
        .strings()?
        .iter()
        .map(|text| Ok(split(utf8(text)?, delimiter, splits_max)))
        .collect::<Result<_, OpError>>()?;
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    let counts: Vec<i64> = lists.iter().map(|list| list.len() as i64).collect();
    let part = |list: &Vec<&str>, i: usize| list.get(i).map_or(Vec::new(), |part| part.as_bytes().to_vec());
    let parts = lists.iter().flat_map(|list| (0..longest).map(move |i| part(list, i))).collect();
    let shape = [x.shape(), &[longest]].concat();
    Ok(vec![Tensor::from_strings(&shape, parts)?, Tensor::new(x.shape(), &counts)?])
}

fn infer_normalizer(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let shape = match cx.shape(0) {
        Some([_]) => Some(vec![Dim::Unknown]),
        Some([first, _]) => Some(vec![first.clone(), Dim::Unknown]),
        Some(_) => return Err(OpError::shape("strings to normalise must have rank 1, or rank 2 with one row")),
        None => None,
    };
    Ok(vec![Fact { dtype: Some(DType::String), shape, content: None }])
}

fn change_case(cx: &OpView) -> Result<fn(&str) -> String, OpError> {
    match cx.attributes().string("case_change_action", "NONE")? {
        "NONE" => Ok(str::to_owned),
        "LOWER" => Ok(str::to_lowercase),
        "UPPER" => Ok(str::to_uppercase),
        other => {
            Err(OpError::attribute("case_change_action", format!("must be NONE, LOWER or UPPER, found {other:?}")))
        }
    }
}

/// Leaves out stop words, then changes case. Where nothing is left, one empty string is.
fn eval_normalizer(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let sensitive = cx.attributes().flag("is_case_sensitive", false)?;
    let key = |text: &str| if sensitive { text.to_owned() } else { text.to_lowercase() };
    let stop_words: Vec<String> = match cx.attributes().get("stopwords") {
        None => Vec::new(),
        Some(crate::Attribute::Strings(words)) => {
            words.iter().map(|word| utf8(word).map(key)).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(OpError::attribute("stopwords", "must be a list of strings")),
    };
    let change = change_case(cx)?;
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for text in x.strings()? {
        let text = utf8(text)?;
        if !stop_words.contains(&key(text)) {
            kept.push(change(text).into_bytes());
        }
    }
    if kept.is_empty() {
        kept.push(Vec::new());
    }
    let shape = match x.shape() {
        [_] => vec![kept.len()],
        [1, _] => vec![1, kept.len()],
        other => return Err(OpError::shape(format!("strings to normalise must have rank 1, or one row: {other:?}"))),
    };
    Ok(vec![Tensor::from_strings(&shape, kept)?])
}
