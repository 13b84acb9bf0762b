//! Sliding windows over spatial axes: the geometry that convolutions and pools share.
//!
//! A node's attributes make a [`WindowSpec`]; with the sizes of the spatial axes it resolves to a [`Window`], which has
//! every size and padding as a number. A [`Window`] always describes the direction of a convolution, from its input
//! (the larger side, usually) to its output: a transposed convolution, and the gradient of a convolution, read the same
//! window from output to input. Formulas: <https://onnx.ai/onnx/operators/onnx__Conv.html>,
//! `onnx__ConvTranspose.html`, `onnx__AveragePool.html` there.

use crate::attribute::Attributes;
use crate::dim::Dim;
use crate::op::{OpError, show_shape};

/// Largest stride, dilation, kernel size or padding accepted: far past any real one, and small enough that no product
/// of two overflows.
const PARAMETER_MAX: i64 = i32::MAX as i64;

/// How the padding at both ends of each axis is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Padding {
    /// Given, for each axis.
    Explicit {
        /// Before the first element.
        begin: Vec<usize>,
        /// After the last element.
        end: Vec<usize>,
    },
    /// As much as makes `output = ceil(input / stride)`; an odd one goes to the end.
    SameUpper,
    /// As much as makes `output = ceil(input / stride)`; an odd one goes to the beginning.
    SameLower,
    /// None.
    Valid,
}

/// Windows as a node's attributes describe them, before the sizes of the axes are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowSpec {
    /// Taps along each axis.
    pub kernel: Vec<usize>,
    /// Steps between windows.
    pub strides: Vec<usize>,
    /// Steps between taps.
    pub dilations: Vec<usize>,
    /// Padding of the input.
    pub padding: Padding,
    /// Whether a last window that reaches past the padded input counts. It must begin inside the input or the padding
    /// before it.
    pub ceil_mode: bool,
}

/// Windows over axes of known size.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Window {
    /// Sizes of the axes that windows slide over.
    pub input: Vec<usize>,
    /// Windows along each axis.
    pub output: Vec<usize>,
    /// Taps along each axis.
    pub kernel: Vec<usize>,
    /// Steps between windows.
    pub strides: Vec<usize>,
    /// Steps between taps.
    pub dilations: Vec<usize>,
    /// Padding before the first element of each axis.
    pub pads_begin: Vec<usize>,
    /// Padding after the last element of each axis.
    pub pads_end: Vec<usize>,
}

impl WindowSpec {
    /// The windows of a pool, whose attribute `kernel_shape` gives the kernel.
    pub fn of_pool(attributes: &Attributes) -> Result<WindowSpec, OpError> {
        let kernel =
            attributes.ints("kernel_shape")?.ok_or_else(|| OpError::attribute("kernel_shape", "is missing"))?;
        WindowSpec::new(attributes, parameters("kernel_shape", kernel, 1)?)
    }

    /// The windows of a convolution, whose weight gives the kernel.
    pub fn of_conv(attributes: &Attributes, kernel: &[usize]) -> Result<WindowSpec, OpError> {
        if let Some(stated) = attributes.ints("kernel_shape")? {
            let stated = parameters("kernel_shape", stated, 1)?;
            if stated != kernel {
                let problem = format!("is {stated:?}, but the weight's kernel is {kernel:?}");
                return Err(OpError::attribute("kernel_shape", problem));
            }
        }
        WindowSpec::new(attributes, kernel.to_vec())
    }

    /// The windows of a kernel with the node's strides, dilations, pads, auto_pad and ceil_mode.
    pub fn new(attributes: &Attributes, kernel: Vec<usize>) -> Result<WindowSpec, OpError> {
        let rank = kernel.len();
        if kernel.iter().any(|k| *k == 0 || *k as i64 > PARAMETER_MAX) {
            return Err(OpError::shape(format!("a kernel of shape {kernel:?}")));
        }
        let ones = |name: &str| match attributes.ints(name)? {
            None => Ok(vec![1; rank]),
            Some(v) if v.len() == rank => parameters(name, v, 1),
            Some(v) => Err(OpError::attribute(name, format!("has {} entries for {rank} spatial axes", v.len()))),
        };
        Ok(WindowSpec {
            strides: ones("strides")?,
            dilations: ones("dilations")?,
            padding: Padding::of(attributes, rank)?,
            ceil_mode: attributes.flag("ceil_mode", false)?,
            kernel,
        })
    }

    /// Elements that a window spans along an axis.
    fn span(&self, axis: usize) -> i128 {
        (self.kernel[axis] as i128 - 1) * self.dilations[axis] as i128 + 1
    }

    fn check_rank(&self, rank: usize) -> Result<(), OpError> {
        if rank == self.kernel.len() {
            return Ok(());
        }
        Err(OpError::shape(format!("{rank} spatial axes for a kernel of shape {:?}", self.kernel)))
    }

    /// The number of windows along each axis of an input whose sizes may be symbols.
    pub fn output_dims(&self, input: &[Dim]) -> Result<Vec<Dim>, OpError> {
        self.check_rank(input.len())?;
        let dims = input.iter().enumerate().map(|(axis, dim)| {
            if let Dim::Known(size) = dim {
                return Ok(Dim::Known(self.resolve_axis(axis, *size)?.0));
            }
            let (span, stride) = (self.span(axis) as i64, self.strides[axis] as i64);
            let pads = match &self.padding {
                Padding::SameUpper | Padding::SameLower => return Ok(dim.divide_ceil(stride)),
                Padding::Valid => (0, 0),
                Padding::Explicit { begin, end } => (begin[axis] as i64, end[axis] as i64),
            };
            let room = dim.offset(pads.0 + pads.1 - span);
            Ok(match self.ceil_mode {
                false => room.divide_floor(stride).offset(1),
                // Otherwise the last window may begin in the padding at the end, which depends on the size.
                true if pads.1 + stride <= span => room.divide_ceil(stride).offset(1),
                true => Dim::Unknown,
            })
        });
        dims.collect()
    }

    /// The windows over axes of these sizes.
    pub fn resolve(&self, input: &[usize]) -> Result<Window, OpError> {
        self.check_rank(input.len())?;
        let axes = (0..input.len()).map(|axis| self.resolve_axis(axis, input[axis])).collect::<Result<Vec<_>, _>>()?;
        Ok(self.window(
            input.to_vec(),
            axes.iter().map(|a| a.0).collect(),
            axes.iter().map(|a| a.1).collect(),
            axes.iter().map(|a| a.2).collect(),
        ))
    }

    fn window(&self, input: Vec<usize>, output: Vec<usize>, pads_begin: Vec<usize>, pads_end: Vec<usize>) -> Window {
        let WindowSpec { kernel, strides, dilations, .. } = self.clone();
        Window { input, output, kernel, strides, dilations, pads_begin, pads_end }
    }

    /// Output size, padding before, padding after.
    fn resolve_axis(&self, axis: usize, input: usize) -> Result<(usize, usize, usize), OpError> {
        let (size, span, stride) = (input as i128, self.span(axis), self.strides[axis] as i128);
        let (output, begin, end) = match &self.padding {
            Padding::SameUpper | Padding::SameLower => {
                let output = (size + stride - 1) / stride;
                let total = ((output - 1) * stride + span - size).max(0);
                let small = total / 2;
                match self.padding {
                    Padding::SameUpper => (output, small, total - small),
                    _ => (output, total - small, small),
                }
            }
            padding => {
                let (begin, end) = match padding {
                    Padding::Explicit { begin, end } => (begin[axis] as i128, end[axis] as i128),
                    _ => (0, 0),
                };
                let room = size + begin + end - span;
                if room < 0 {
                    return Err(OpError::shape(format!(
                        "a window of {span} over spatial axis {axis} of {size} with padding {begin} and {end}"
                    )));
                }
                let mut output = room / stride + 1;
                if self.ceil_mode {
                    output += i128::from(room % stride != 0);
                    output -= i128::from((output - 1) * stride >= size + begin);
                }
                (output, begin, end)
            }
        };
        let small = |v: i128| usize::try_from(v).map_err(|_| OpError::shape(format!("spatial axis {axis} of {input}")));
        Ok((small(output)?, small(begin)?, small(end)?))
    }

    /// The sizes that a transposed convolution makes of an input whose sizes may be symbols.
    pub fn transposed_dims(&self, attributes: &Attributes, input: &[Dim]) -> Result<Vec<Dim>, OpError> {
        self.check_rank(input.len())?;
        if let Some(shape) = transposed_shape(attributes, input.len())? {
            return Ok(shape.into_iter().map(Dim::Known).collect());
        }
        let extra = output_padding(attributes, input.len())?;
        let dims = input.iter().enumerate().map(|(axis, dim)| {
            let stride = Dim::Known(self.strides[axis]);
            let span = self.span(axis) as i64;
            match &self.padding {
                Padding::SameUpper | Padding::SameLower => dim.times(&stride),
                Padding::Valid => dim.offset(-1).times(&stride).offset(span + extra[axis] as i64),
                Padding::Explicit { begin, end } => {
                    let pads = (begin[axis] + end[axis]) as i64;
                    dim.offset(-1).times(&stride).offset(span + extra[axis] as i64 - pads)
                }
            }
        });
        Ok(dims.collect())
    }

    /// The windows of a transposed convolution of an input of these sizes: [`Window::output`] is that input, and
    /// [`Window::input`] what the operator makes.
    pub fn resolve_transposed(&self, attributes: &Attributes, input: &[usize]) -> Result<Window, OpError> {
        self.check_rank(input.len())?;
        let rank = input.len();
        let shape = transposed_shape(attributes, rank)?;
        let extra = output_padding(attributes, rank)?;
        let (mut made, mut pads_begin, mut pads_end) = (vec![], vec![], vec![]);
        for axis in 0..rank {
            let stride = self.strides[axis] as i128;
            let full = (input[axis] as i128 - 1) * stride + extra[axis] as i128 + self.span(axis);
            let wanted = match (&shape, &self.padding) {
                (Some(shape), _) => Some(shape[axis] as i128),
                (None, Padding::SameUpper | Padding::SameLower) => Some(input[axis] as i128 * stride),
                _ => None,
            };
            let (size, begin, end) = match (wanted, &self.padding) {
                (Some(wanted), padding) => {
                    let total = (full - wanted).max(0);
                    let (small, large) = (total / 2, total - total / 2);
                    if *padding == Padding::SameUpper { (wanted, small, large) } else { (wanted, large, small) }
                }
                (None, Padding::Explicit { begin, end }) => {
                    let (begin, end) = (begin[axis] as i128, end[axis] as i128);
                    (full - begin - end, begin, end)
                }
                (None, _) => (full, 0, 0),
            };
            let small = |v: i128| {
                usize::try_from(v).map_err(|_| {
                    OpError::shape(format!(
                        "a transposed convolution makes {v} of spatial axis {axis} of {}",
                        input[axis]
                    ))
                })
            };
            made.push(small(size)?);
            pads_begin.push(small(begin)?);
            pads_end.push(small(end)?);
        }
        Ok(self.window(made, input.to_vec(), pads_begin, pads_end))
    }
}

impl Padding {
    fn of(attributes: &Attributes, rank: usize) -> Result<Padding, OpError> {
        match attributes.string("auto_pad", "NOTSET")? {
            "NOTSET" | "" => {}
            "SAME_UPPER" => return Ok(Padding::SameUpper),
            "SAME_LOWER" => return Ok(Padding::SameLower),
            "VALID" => return Ok(Padding::Valid),
            other => {
                let problem = format!("is {other:?}; NOTSET, SAME_UPPER, SAME_LOWER and VALID are known");
                return Err(OpError::attribute("auto_pad", problem));
            }
        }
        let pads = match attributes.ints("pads")? {
            None => vec![0; 2 * rank],
            Some(v) if v.len() == 2 * rank => parameters("pads", v, 0)?,
            Some(v) => {
                let problem = format!("has {} entries, expected two for each of {rank} spatial axes", v.len());
                return Err(OpError::attribute("pads", problem));
            }
        };
        let (begin, end) = pads.split_at(rank);
        Ok(Padding::Explicit { begin: begin.to_vec(), end: end.to_vec() })
    }
}

impl Window {
    /// Number of spatial axes.
    pub fn rank(&self) -> usize {
        self.kernel.len()
    }

    /// Elements of one channel of the input.
    pub fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    /// Elements of one channel of the output.
    pub fn output_len(&self) -> usize {
        self.output.iter().product()
    }

    /// Taps of one window.
    pub fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// For each window how many elements an average counts: those of the input or, where padding counts, those of the
    /// padded input.
    pub fn averaged_counts(&self, include_padding: bool) -> Vec<f64> {
        let mut counts = vec![1.0];
        for axis in 0..self.rank() {
            let padded = self.pads_begin[axis] + self.input[axis] + self.pads_end[axis];
            let along = (0..self.output[axis]).map(|o| {
                let taps = (0..self.kernel[axis]).filter(|t| match include_padding {
                    true => o * self.strides[axis] + t * self.dilations[axis] < padded,
                    false => self.input_at(axis, o, *t).is_some(),
                });
                taps.count() as f64
            });
            let along: Vec<f64> = along.collect();
            counts = counts.iter().flat_map(|c| along.iter().map(move |n| c * n)).collect();
        }
        counts
    }

    /// The element along an axis that a tap of a window reads; `None` in the padding.
    pub fn input_at(&self, axis: usize, output: usize, tap: usize) -> Option<usize> {
        let at = (output * self.strides[axis] + tap * self.dilations[axis]).checked_sub(self.pads_begin[axis])?;
        (at < self.input[axis]).then_some(at)
    }

    /// Calls `f` with the linear positions (output, tap, input) of every tap that reads an element. The taps of one
    /// window come in row-major order.
    pub fn visit(&self, mut f: impl FnMut(usize, usize, usize)) {
        self.visit_axis(0, [0; 3], &mut f);
    }

    fn visit_axis(&self, axis: usize, [output, tap, input]: [usize; 3], f: &mut dyn FnMut(usize, usize, usize)) {
        if axis == self.rank() {
            return f(output, tap, input);
        }
        for o in 0..self.output[axis] {
            for t in 0..self.kernel[axis] {
                if let Some(i) = self.input_at(axis, o, t) {
                    let next =
                        [output * self.output[axis] + o, tap * self.kernel[axis] + t, input * self.input[axis] + i];
                    self.visit_axis(axis + 1, next, f);
                }
            }
        }
    }

    /// The attributes that say the same with explicit pads.
    pub fn attributes(&self) -> Attributes {
        let ints = |v: &[usize]| v.iter().map(|n| *n as i64).collect::<Vec<i64>>();
        Attributes::from([
            ("kernel_shape", ints(&self.kernel).into()),
            ("strides", ints(&self.strides).into()),
            ("dilations", ints(&self.dilations).into()),
            ("pads", ints(&[self.pads_begin.as_slice(), &self.pads_end].concat()).into()),
        ])
    }
}

/// The spatial axes of `[N, C, ...]`.
pub fn spatial<'a, T>(shape: &'a [T], what: &str) -> Result<&'a [T], OpError>
where
    T: Clone + Into<Dim>,
{
    shape.get(2..).ok_or_else(|| {
        let shown: Vec<Dim> = shape.iter().cloned().map(Into::into).collect();
        OpError::shape(format!("{what} must be [N, C, ...], found shape {}", show_shape(&shown)))
    })
}

fn parameters(name: &str, values: &[i64], min: i64) -> Result<Vec<usize>, OpError> {
    values
        .iter()
        .map(|v| match usize::try_from(*v) {
            Ok(n) if (min..=PARAMETER_MAX).contains(v) => Ok(n),
            _ => Err(OpError::attribute(name, format!("is {values:?}; {min} to {PARAMETER_MAX} is accepted"))),
        })
        .collect()
}

fn output_padding(attributes: &Attributes, rank: usize) -> Result<Vec<usize>, OpError> {
    match attributes.ints("output_padding")? {
        None => Ok(vec![0; rank]),
        Some(v) if v.len() == rank => parameters("output_padding", v, 0),
        Some(v) => {
            Err(OpError::attribute("output_padding", format!("has {} entries for {rank} spatial axes", v.len())))
        }
    }
}

/// The attribute `output_shape`; some files give batch and channels too.
fn transposed_shape(attributes: &Attributes, rank: usize) -> Result<Option<Vec<usize>>, OpError> {
    match attributes.ints("output_shape")? {
        None => Ok(None),
        Some(v) if v.len() == rank || v.len() == rank + 2 => {
            Ok(Some(parameters("output_shape", &v[v.len() - rank..], 0)?))
        }
        Some(v) => Err(OpError::attribute("output_shape", format!("has {} entries for {rank} spatial axes", v.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(input: &[usize], attributes: Attributes) -> Vec<usize> {
        let spec = WindowSpec::of_pool(&attributes).unwrap();
        let window = spec.resolve(input).unwrap();
        let dims: Vec<Dim> = input.iter().map(|n| Dim::Known(*n)).collect();
        assert_eq!(spec.output_dims(&dims).unwrap(), crate::dim::dims(&window.output));
        let symbol = spec.output_dims(&[Dim::symbol("H")]);
        if let (1, Ok(symbolic)) = (input.len(), symbol) {
            let evaluated = symbolic[0].evaluate(&|_| Some(input[0]));
            assert!(symbolic[0] == Dim::Unknown || evaluated == Some(window.output[0]), "{symbolic:?} {window:?}");
        }
        window.output
    }

    #[test]
    fn sizes_follow_the_formulas_of_the_specification() {
        let rows: [(usize, Attributes, usize); 7] = [
            (32, [("kernel_shape", [3].into()), ("pads", [1, 1].into())].into(), 32),
            (224, [("kernel_shape", [7].into()), ("pads", [3, 3].into()), ("strides", [2].into())].into(), 112),
            (7, [("kernel_shape", [3].into()), ("dilations", [2].into())].into(), 3),
            (5, [("kernel_shape", [3].into()), ("strides", [2].into()), ("auto_pad", "SAME_LOWER".into())].into(), 3),
            (5, [("kernel_shape", [3].into()), ("strides", [2].into()), ("auto_pad", "VALID".into())].into(), 2),
            (6, [("kernel_shape", [3].into()), ("strides", [2].into()), ("ceil_mode", 1.into())].into(), 3),
            // The second window would begin in the padding at the end.
            (
                2,
                [
                    ("kernel_shape", [1].into()),
                    ("strides", [2].into()),
                    ("pads", [0, 1].into()),
                    ("ceil_mode", 1.into()),
                ]
                .into(),
                1,
            ),
        ];
        for (input, attributes, expected) in rows {
            assert_eq!(output(&[input], attributes.clone()), [expected], "{input} {attributes:?}");
        }
    }

    #[test]
    fn attributes_out_of_range_are_refused_by_name() {
        let rows: [Attributes; 4] = [
            [("kernel_shape", [0].into())].into(),
            [("kernel_shape", [1].into()), ("strides", [0].into())].into(),
            [("kernel_shape", [1].into()), ("pads", [i64::MAX, 0].into())].into(),
            [("kernel_shape", [1].into()), ("dilations", [-1].into())].into(),
        ];
        for attributes in rows {
            let refused = WindowSpec::of_pool(&attributes);
            assert!(matches!(refused, Err(OpError::Attribute { .. })), "{attributes:?}: {refused:?}");
        }
        let larger = WindowSpec::of_pool(&[("kernel_shape", [4].into())].into()).unwrap();
        assert!(larger.resolve(&[3]).is_err());
    }

    #[test]
    fn a_transposed_window_is_that_of_the_convolution_back() {
        let attributes: Attributes =
            [("kernel_shape", [3].into()), ("strides", [2].into()), ("pads", [1, 1].into())].into();
        let spec = WindowSpec::of_pool(&attributes).unwrap();
        let up = spec.resolve_transposed(&attributes, &[5]).unwrap();
        assert_eq!((up.input.as_slice(), up.output.as_slice()), ([9].as_slice(), [5].as_slice()));
        assert_eq!(spec.resolve(&[9]).unwrap(), up);
    }
}
