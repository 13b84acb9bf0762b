//! Chains of elementwise operators as one loop over blocks that fit the first-level cache.
//!
//! A [`Program`] is a list of operations on registers of [`BLOCK`] numbers. Operands that lie as the output does are
//! read in place; stretched or permuted ones are spread into a register first. So a chain of ten operators reads each
//! operand from memory once and writes each result once, and every inner loop is a plain one over `BLOCK` numbers.
//! Truth values are the numbers 0 and 1 inside a program.

use std::ops::Range;

use crate::cpu::convert::Kind;
use crate::cpu::isa::dispatch;
use crate::cpu::kernel::{Tile, TileKernel};
use crate::cpu::layout::Layout;
use crate::cpu::math;

/// Numbers in a register: a dozen of them fit the first-level cache, and the cost of choosing the loop is spread thin.
pub(crate) const BLOCK: usize = 512;

/// One operation on registers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Op {
    // Of one operand.
    Copy,
    Neg,
    Abs,
    Sign,
    Floor,
    Ceil,
    Round,
    Sqrt,
    Reciprocal,
    Exp,
    Log,
    Erf,
    Tanh,
    Sigmoid,
    Softplus,
    Softsign,
    Sin,
    Cos,
    Relu,
    Gelu,
    GeluTanh,
    Not,
    LeakyRelu(f32),
    Elu(f32),
    Selu(f32, f32),
    HardSigmoid(f32, f32),
    IsNan,
    // Of two.
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    Pow,
    Equal,
    Less,
    LessOrEqual,
    And,
    Or,
    Xor,
    /// `dy` where `y > 0`.
    ReluGradient,
    /// `dy` times the derivative at `x`.
    GeluGradient,
    GeluTanhGradient,
    /// The code of a quotient with a zero point: rounded, ties to even, shifted, clamped to these limits.
    Code {
        low: f32,
        high: f32,
    },
    // Of three.
    /// The second where the first is true, else the third.
    Where,
}

/// How an operand gets into a register.
#[derive(Debug, Clone, PartialEq)]
enum Access {
    /// It lies as the output does: read where it is.
    Direct,
    /// One number for all.
    Scalar,
    /// `(size, stride)` pairs, outermost first, that visit it in the output's order.
    Runs(Vec<(usize, usize)>),
}

#[derive(Debug, Clone)]
struct Load {
    access: Access,
    kind: Kind,
}

#[derive(Debug, Clone)]
struct Instruction {
    op: Op,
    arguments: [usize; 3],
}

/// A chain of elementwise operators over one output shape. Values are numbered: loads first, then instructions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    loads: Vec<Load>,
    instructions: Vec<Instruction>,
    stores: Vec<(usize, Kind)>,
    /// The register of each instruction's result.
    registers: Vec<usize>,
    register_count: usize,
}

impl Program {
    /// A program of these loads (layouts stretched to the output's shape), instructions (operator and the numbers of
    /// its arguments) and stores (the number of what to store, in the order of the outputs).
    pub(crate) fn new(
        loads: &[(Layout, Kind)],
        instructions: &[(Op, [usize; 3])],
        stores: &[(usize, Kind)],
    ) -> Program {
        let loads: Vec<Load> = loads
            .iter()
            .map(|(layout, kind)| {
                let runs = layout.runs();
                let access = match runs.as_slice() {
                    _ if layout.is_contiguous() && *kind == Kind::F32 => Access::Direct,
                    [] | [(_, 0)] => Access::Scalar,
                    _ => Access::Runs(runs),
                };
                Load { access, kind: *kind }
            })
            .collect();
        let instructions: Vec<Instruction> =
            instructions.iter().map(|(op, arguments)| Instruction { op: *op, arguments: *arguments }).collect();
        let (registers, register_count) = allocate(&loads, &instructions, stores);
        Program { loads, instructions, stores: stores.to_vec(), registers, register_count }
    }

    /// Bytes of scratch memory that [`TileKernel::run`] needs.
    pub(crate) fn scratch_bytes(&self) -> usize {
        self.register_count * BLOCK * size_of::<f32>()
    }

    fn register(&self, value: usize) -> Option<usize> {
        match value.checked_sub(self.loads.len()) {
            None if self.loads[value].access == Access::Direct => None,
            None => Some(self.loads[..value].iter().filter(|l| l.access != Access::Direct).count()),
            Some(instruction) => Some(self.registers[instruction]),
        }
    }
}

/// Gives each instruction a register that none of its arguments and no value still needed lies in. Spread loads keep
/// the first registers.
fn allocate(loads: &[Load], instructions: &[Instruction], stores: &[(usize, Kind)]) -> (Vec<usize>, usize) {
    let count = loads.len() + instructions.len();
    let mut last_use = vec![0; count];
    for (at, instruction) in instructions.iter().enumerate() {
        for argument in instruction.arguments {
            last_use[argument] = at;
        }
    }
    for (value, _) in stores {
        last_use[*value] = usize::MAX;
    }
    let mut next = loads.iter().filter(|l| l.access != Access::Direct).count();
    let mut free: Vec<usize> = Vec::new();
    let mut registers: Vec<usize> = Vec::with_capacity(instructions.len());
    for at in 0..instructions.len() {
        let register = free.pop().unwrap_or_else(|| {
            next += 1;
            next - 1
        });
        registers.push(register);
        let mut ended: Vec<usize> = instructions[at]
            .arguments
            .into_iter()
            .chain([loads.len() + at])
            .filter(|v| *v >= loads.len() && last_use[*v] <= at)
            .map(|v| registers[v - loads.len()])
            .collect();
        ended.sort_unstable();
        ended.dedup();
        free.extend(ended);
    }
    (registers, next)
}

impl TileKernel for Program {
    fn run(&self, tile: &mut Tile<'_>) {
        let Range { start, end } = tile.units.clone();
        let scratch: &mut [f32] = bytemuck::cast_slice_mut(&mut *tile.scratch);
        let base = scratch.as_mut_ptr();
        let register_at = |register: usize| base.wrapping_add(register * BLOCK);
        for (index, load) in self.loads.iter().enumerate() {
            if load.access == Access::Scalar
                && let Some(register) = self.register(index)
            {
                // SAFETY: a scalar has its element 0; registers lie inside the scratch memory.
                unsafe {
                    let block = std::slice::from_raw_parts_mut(register_at(register), BLOCK);
                    load.kind.read(tile.inputs[index], 0, 0, block);
                }
            }
        }
        let mut at = start;
        while at < end {
            let len = BLOCK.min(end - at);
            for (index, load) in self.loads.iter().enumerate() {
                if let (Access::Runs(runs), Some(register)) = (&load.access, self.register(index)) {
                    // SAFETY: each spread load has its own register inside the scratch memory.
                    let block = unsafe { std::slice::from_raw_parts_mut(register_at(register), len) };
                    let from = tile.inputs[index];
                    // SAFETY: the runs visit elements of the operand, by the layout it was built from.
                    unsafe { spread(runs, at, block, from, load.kind) }
                }
            }
            let source = |value: usize| -> *const f32 {
                match self.register(value) {
                    Some(register) => register_at(register).cast_const(),
                    None => tile.inputs[value].cast::<f32>().wrapping_add(at),
                }
            };
            for (i, instruction) in self.instructions.iter().enumerate() {
                let [a, b, c] = instruction.arguments.map(source);
                // SAFETY: registers hold `BLOCK` numbers and direct operands the elements `at..at + len`; `allocate`
                // gives a result a register that no argument lies in, and the plan keeps operands apart from scratch.
                unsafe {
                    let out = std::slice::from_raw_parts_mut(register_at(self.registers[i]), len);
                    let a = std::slice::from_raw_parts(a, len);
                    let b = std::slice::from_raw_parts(b, len);
                    let c = std::slice::from_raw_parts(c, len);
                    apply(instruction.op, out, a, b, c);
                }
            }
            // Only now, so that an output may lie where an operand does.
            for (index, (value, kind)) in self.stores.iter().enumerate() {
                let from = source(*value);
                // SAFETY: outputs have the elements `at..at + len`, which belong to this tile. The source may be the
                // same memory, for which writing as it is is defined.
                unsafe { kind.write(from, len, tile.outputs[index], at) }
            }
            at += len;
        }
    }
}

/// Fills `out` with the elements at positions `start..` of the order that `runs` visit.
///
/// # Safety
/// `from` must have every element that the runs reach.
unsafe fn spread(runs: &[(usize, usize)], start: usize, out: &mut [f32], from: *const u8, kind: Kind) {
    let Some(((inner, stride), outer)) = runs.split_last() else { return };
    let mut row = start / inner;
    let mut column = start % inner;
    let mut rest = out;
    while !rest.is_empty() {
        let len = rest.len().min(inner - column);
        let (head, tail) = rest.split_at_mut(len);
        let mut left = row;
        let mut offset = column * stride;
        for (size, stride) in outer.iter().rev() {
            offset += left % size * stride;
            left /= size;
        }
        // SAFETY: by the caller's promise.
        unsafe { kind.read(from, offset, *stride, head) }
        rest = tail;
        row += 1;
        column = 0;
    }
}

dispatch! {
    /// One operation over one block; operators of fewer than three operands ignore the rest.
    fn apply(op: Op, out: &mut [f32], a: &[f32], b: &[f32], c: &[f32]) = apply_body
}

#[inline(always)]
fn apply_body<const FMA: bool>(op: Op, out: &mut [f32], a: &[f32], b: &[f32], c: &[f32]) {
    // Plain loops, not functions that take functions: a closure or shim that is not inlined loses the instruction set,
    // and then every multiply-add is a call of a library.
    macro_rules! one {
        ($x:ident => $value:expr) => {
            for (out, a) in out.iter_mut().zip(a) {
                let $x = *a;
                *out = $value;
            }
        };
    }
    macro_rules! two {
        ($x:ident, $y:ident => $value:expr) => {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                let ($x, $y) = (*a, *b);
                *out = $value;
            }
        };
    }
    let truth = |b: bool| if b { 1.0 } else { 0.0 };
    match op {
        Op::Copy => out.copy_from_slice(a),
        Op::Neg => one!(x => -x),
        Op::Abs => one!(x => f32::abs(x)),
        Op::Sign => one!(x => {
            if x > 0.0 {
                1.0
            } else if x < 0.0 {
                -1.0
            } else {
                x
            }
        }),
        Op::Floor => one!(x => f32::floor(x)),
        Op::Ceil => one!(x => f32::ceil(x)),
        Op::Round => one!(x => f32::round_ties_even(x)),
        Op::Sqrt => one!(x => f32::sqrt(x)),
        Op::Reciprocal => one!(x => 1.0 / x),
        Op::Exp => one!(x => math::exp::<FMA>(x)),
        Op::Log => one!(x => math::log::<FMA>(x)),
        Op::Erf => one!(x => math::erf::<FMA>(x)),
        Op::Tanh => one!(x => math::tanh::<FMA>(x)),
        Op::Sigmoid => one!(x => math::sigmoid::<FMA>(x)),
        Op::Softplus => one!(x => math::softplus::<FMA>(x)),
        Op::Softsign => one!(x => x / (1.0 + x.abs())),
        Op::Sin => one!(x => libm::sin(f64::from(x)) as f32),
        Op::Cos => one!(x => libm::cos(f64::from(x)) as f32),
        // Written so that not-a-number stays one.
        Op::Relu => one!(x => if x < 0.0 { 0.0 } else { x }),
        Op::Gelu => one!(x => math::gelu::<FMA>(x)),
        Op::GeluTanh => one!(x => math::gelu_tanh::<FMA>(x)),
        Op::Not => one!(x => truth(x == 0.0)),
        Op::LeakyRelu(slope) => one!(x => if x < 0.0 { slope * x } else { x }),
        Op::Elu(alpha) => selu::<FMA>(alpha, 1.0, out, a),
        Op::Selu(alpha, gamma) => selu::<FMA>(alpha, gamma, out, a),
        Op::HardSigmoid(alpha, beta) => one!(x => {
            let y = alpha * x + beta;
            let y = if y < 0.0 { 0.0 } else { y };
            if y > 1.0 { 1.0 } else { y }
        }),
        Op::IsNan => one!(x => truth(x.is_nan())),
        Op::Add => two!(x, y => x + y),
        Op::Sub => two!(x, y => x - y),
        Op::Mul => two!(x, y => x * y),
        Op::Div => two!(x, y => x / y),
        Op::Max => two!(x, y => if x.is_nan() || x > y { x } else { y }),
        Op::Min => two!(x, y => if x.is_nan() || x < y { x } else { y }),
        Op::Pow => two!(x, y => libm::pow(f64::from(x), f64::from(y)) as f32),
        Op::Equal => two!(x, y => truth(x == y)),
        Op::Less => two!(x, y => truth(x < y)),
        Op::LessOrEqual => two!(x, y => truth(x <= y)),
        Op::And => two!(x, y => truth(x != 0.0 && y != 0.0)),
        Op::Or => two!(x, y => truth(x != 0.0 || y != 0.0)),
        Op::Xor => two!(x, y => truth((x != 0.0) != (y != 0.0))),
        Op::ReluGradient => two!(dy, y => if y > 0.0 { dy } else { 0.0 }),
        Op::GeluGradient => two!(x, y => math::gelu_gradient::<FMA>(x, y)),
        Op::GeluTanhGradient => two!(x, y => math::gelu_tanh_gradient::<FMA>(x, y)),
        // Not-a-number takes the smallest code; the comparisons are written for that.
        Op::Code { low, high } => two!(x, zero => {
            let code = f32::round_ties_even(x);
            let code = if code > low - zero { code } else { low - zero };
            let code = if code < high - zero { code } else { high - zero };
            code + zero
        }),
        Op::Where => {
            two!(condition, x => if condition != 0.0 { x } else { 0.0 });
            out.iter_mut()
                .zip(a)
                .zip(c)
                .for_each(|((out, condition), y)| *out = if *condition != 0.0 { *out } else { *y });
        }
    }
}

#[inline(always)]
fn selu<const FMA: bool>(alpha: f32, gamma: f32, out: &mut [f32], a: &[f32]) {
    for (out, x) in out.iter_mut().zip(a) {
        let negative = alpha * (math::exp::<FMA>(*x) - 1.0);
        *out = gamma * if *x < 0.0 { negative } else { *x };
    }
}
