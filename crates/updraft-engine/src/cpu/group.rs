//! Neighbouring nodes as one step over tiles.
//!
//! The members of a group agree on leading axes (its *units*): each computes any range of units of its outputs from
//! the same range of what other members make. So one thread can take a range of units through all members while it is
//! in its cache, and what only members read exists for one tile at a time and never reaches main memory. Elementwise
//! members that follow one another become one [`Program`]. A matrix product with bias and activation, a residual sum
//! with the normalisation after it, and attention (scores, scale, mask, softmax, product, for each batch and head)
//! are all groups, and so are their gradients; none needs a pattern of its own.

use std::collections::HashMap;
use std::ops::Range;

use updraft_graph::{DType, OpError};

use crate::cpu::convert::Kind;
use crate::cpu::elementwise::{Op, Program};
use crate::cpu::kernel::{Io, Kernel, Pool, Raw, Shared, Tile, TileKernel};
use crate::cpu::layout::Layout;
use crate::cpu::lower::Static;
use crate::cpu::map::Argument;
use crate::cpu::step::{Span, Step, StepRun, Storage, StorageId};

/// One node's work in a group.
pub(crate) struct Member {
    pub(crate) label: String,
    pub(crate) op: String,
    /// Of elementwise work, stretched to the output's shape.
    pub(crate) inputs: Vec<Option<Static>>,
    /// Inputs that are read in the units of the tile only.
    pub(crate) aligned: Vec<usize>,
    pub(crate) outputs: Vec<Option<Static>>,
    /// How many leading axes of the outputs may be cut into tiles.
    pub(crate) axes: usize,
    /// Additions or like work for one element of the first output.
    pub(crate) work: usize,
    /// Fewest of its own units that are worth a call.
    pub(crate) units_min: usize,
    pub(crate) scratch_bytes: usize,
    pub(crate) run: Work,
}

/// How a member computes.
pub(crate) enum Work {
    Map(Vec<(Op, Vec<Argument>)>),
    Kernel(Box<dyn TileKernel>),
}

impl Member {
    fn shape(&self) -> &[usize] {
        self.outputs.iter().flatten().next().map_or(&[], |s| &s.layout.shape)
    }

    fn own_units(&self) -> usize {
        self.shape()[..self.axes].iter().product()
    }
}

/// Fewest units that a group is narrowed to for the sake of another member: enough for some threads.
const UNITS_MIN: usize = 8;

/// Members of one group at most: what they keep for a tile must fit a cache.
const MEMBERS_MAX: usize = 48;

/// Additions or like work in one tile: some ten microseconds, and operands that fit the second-level cache.
const TILE_WORK: usize = 1 << 16;

/// A group that may still grow.
pub(crate) struct Group {
    /// Sizes of the leading axes that are cut into tiles.
    lead: Vec<usize>,
    members: Vec<Member>,
}

impl Group {
    pub(crate) fn new(member: Member) -> Group {
        Group { lead: member.shape()[..member.axes].to_vec(), members: vec![member] }
    }

    /// The storages that members make.
    pub(crate) fn made(&self) -> Vec<StorageId> {
        self.members.iter().flat_map(|m| m.outputs.iter().flatten()).map(|s| s.storage).collect()
    }

    fn common_lead(&self, member: &Member) -> usize {
        let shape = &member.shape()[..member.axes];
        self.lead.iter().zip(shape).take_while(|(a, b)| a == b).count()
    }

    /// Whether every tile of the group would still depend on the same tile only.
    pub(crate) fn accepts(&self, member: &Member, storages: &[Storage]) -> bool {
        let lead = &self.lead[..self.common_lead(member)];
        let units: usize = lead.iter().product();
        let had: usize = self.lead.iter().product();
        if units < UNITS_MIN.min(had) || self.members.len() >= MEMBERS_MAX {
            return false;
        }
        let made = self.made();
        member.inputs.iter().enumerate().all(|(index, input)| match input {
            Some(input) if made.contains(&input.storage) => {
                let elements = storages[input.storage].bytes / input.dtype.size_in_memory();
                member.aligned.contains(&index) && is_local(&input.layout, lead, elements)
            }
            _ => true,
        })
    }

    /// Adds a member that the group accepts.
    pub(crate) fn add(&mut self, member: Member) {
        self.lead.truncate(self.common_lead(&member));
        self.members.push(member);
    }

    /// The step that computes the members. Storages of which no reads remain exist for one tile at a time.
    pub(crate) fn into_step(self, bytes: &[usize], remaining: &[usize]) -> Step {
        let units: usize = self.lead.iter().product::<usize>().max(1);
        let label = join(self.members.iter().map(|m| &m.label), " + ");
        let op = join(self.members.iter().map(|m| &m.op), "+");
        let cost: usize = self.members.iter().map(|m| m.work * m.shape().iter().product::<usize>()).sum();
        let least =
            self.members.iter().map(|m| m.units_min.div_ceil((m.own_units() / units).max(1))).max().unwrap_or(1);
        let wanted = (TILE_WORK * units).div_ceil(cost.max(1)).max(least).clamp(1, units);
        // Tiles of nearly equal size.
        let units_per_tile = units.div_ceil(units.div_ceil(wanted));

        let made = self.made();
        let mut table = Table { places: HashMap::new(), inputs: Vec::new(), outputs: Vec::new(), locals: Vec::new() };
        let mut local_bytes = 0;
        for storage in &made {
            if remaining[*storage] > 0 {
                table.places.insert(*storage, Place::Output(table.outputs.len()));
                table.outputs.push(*storage);
            } else {
                let unit_bytes = bytes[*storage] / units;
                table.places.insert(*storage, Place::Local(table.locals.len()));
                table.locals.push(Local { unit_bytes, offset_bytes: local_bytes });
                local_bytes += (unit_bytes * units_per_tile).next_multiple_of(64);
            }
        }
        let ops = TileOp::all(self.members, units, remaining, &mut table);
        let kernel_bytes = ops.iter().map(|op| op.scratch_bytes).max().unwrap_or(0);
        let whole = |storage: &StorageId| Some(Span { storage: *storage, offset_bytes: 0, bytes: bytes[*storage] });
        Step {
            label,
            op,
            inputs: table.inputs.iter().map(whole).collect(),
            outputs: table.outputs.iter().map(whole).collect(),
            scratch_bytes: (local_bytes + kernel_bytes).next_multiple_of(64),
            run: StepRun::Kernel(Box::new(Tiles {
                ops,
                locals: table.locals,
                units,
                units_per_tile,
                local_bytes,
                worker_bytes: (local_bytes + kernel_bytes).next_multiple_of(64),
            })),
            in_place: Vec::new(),
        }
    }
}

fn join<'a>(parts: impl Iterator<Item = &'a String>, separator: &str) -> String {
    parts.filter(|p| !p.is_empty()).map(String::as_str).collect::<Vec<_>>().join(separator)
}

/// Whether a layout of a storage of so many elements reads, for each unit, elements of that unit's part only.
fn is_local(layout: &Layout, lead: &[usize], elements: usize) -> bool {
    let units: usize = lead.iter().product();
    if units == 0
        || !elements.is_multiple_of(units)
        || layout.shape.len() < lead.len()
        || layout.shape[..lead.len()] != *lead
    {
        return false;
    }
    let unit = elements / units;
    let mut expected = unit;
    for (size, stride) in lead.iter().zip(&layout.strides).rev() {
        if *size != 1 && *stride != expected {
            return false;
        }
        expected *= size;
    }
    let reach: usize =
        layout.shape.iter().zip(&layout.strides).skip(lead.len()).map(|(n, s)| n.saturating_sub(1) * s).sum();
    layout.offset + reach < unit
}

/// Where a storage is while tiles run.
#[derive(Debug, Clone, Copy)]
enum Place {
    Input(usize),
    Output(usize),
    Local(usize),
}

/// A value that exists for one tile at a time.
struct Local {
    unit_bytes: usize,
    offset_bytes: usize,
}

struct Table {
    places: HashMap<StorageId, Place>,
    inputs: Vec<StorageId>,
    outputs: Vec<StorageId>,
    locals: Vec<Local>,
}

impl Table {
    fn place(&mut self, value: &Static) -> (Place, usize) {
        let place = *self.places.entry(value.storage).or_insert_with(|| {
            self.inputs.push(value.storage);
            Place::Input(self.inputs.len() - 1)
        });
        (place, value.layout.offset * value.dtype.size_in_memory())
    }
}

/// One kernel's part of a step.
struct TileOp {
    kernel: Box<dyn TileKernel>,
    /// Where its operands are, and their offset there in bytes.
    inputs: Vec<Option<(Place, usize)>>,
    outputs: Vec<Option<(Place, usize)>>,
    /// Its own units in one unit of the group.
    scale: usize,
    scratch_bytes: usize,
}

impl TileOp {
    fn all(members: Vec<Member>, units: usize, remaining: &[usize], table: &mut Table) -> Vec<TileOp> {
        // The last member that reads each storage.
        let mut last_reader: HashMap<StorageId, usize> = HashMap::new();
        for (at, member) in members.iter().enumerate() {
            for input in member.inputs.iter().flatten() {
                last_reader.insert(input.storage, at);
            }
        }
        let mut out = Vec::new();
        let mut chain: Vec<Member> = Vec::new();
        for (at, member) in members.into_iter().enumerate() {
            match member.run {
                Work::Map(_) => {
                    if !continues(&chain, &member) {
                        flush(&mut chain, at, units, remaining, &last_reader, table, &mut out);
                    }
                    chain.push(member);
                }
                Work::Kernel(kernel) => {
                    flush(&mut chain, at, units, remaining, &last_reader, table, &mut out);
                    let own: usize = member
                        .outputs
                        .iter()
                        .flatten()
                        .next()
                        .map_or(1, |s| s.layout.shape[..member.axes].iter().product());
                    out.push(TileOp {
                        kernel,
                        inputs: member.inputs.iter().map(|v| v.as_ref().map(|v| table.place(v))).collect(),
                        outputs: member.outputs.iter().map(|v| v.as_ref().map(|v| table.place(v))).collect(),
                        scale: own / units,
                        scratch_bytes: member.scratch_bytes,
                    });
                }
            }
        }
        flush(&mut chain, usize::MAX, units, remaining, &last_reader, table, &mut out);
        out
    }
}

/// Whether a member can be part of the program of these: it has their shape and reads what they make element by
/// element.
fn continues(chain: &[Member], member: &Member) -> bool {
    let Some(first) = chain.first() else { return true };
    first.shape() == member.shape()
        && member.inputs.iter().flatten().all(|input| {
            let is_made = chain.iter().flat_map(|m| m.outputs.iter().flatten()).any(|o| o.storage == input.storage);
            !is_made || (input.layout.offset == 0 && input.layout.is_contiguous())
        })
}

/// Turns a chain of elementwise members, the one before member `next`, into a program.
fn flush(
    chain: &mut Vec<Member>,
    next: usize,
    units: usize,
    remaining: &[usize],
    last_reader: &HashMap<StorageId, usize>,
    table: &mut Table,
    out: &mut Vec<TileOp>,
) {
    let chain = std::mem::take(chain);
    let Some(elements) = chain.first().map(|m| m.shape().iter().product::<usize>()) else { return };
    let made: Vec<StorageId> = chain.iter().flat_map(|m| m.outputs.iter().flatten()).map(|s| s.storage).collect();
    let mut loads: Vec<Static> = Vec::new();
    for input in chain.iter().flat_map(|m| m.inputs.iter().flatten()) {
        let is_known = loads.iter().any(|l| l.storage == input.storage && l.layout == input.layout);
        if !made.contains(&input.storage) && !is_known {
            loads.push(input.clone());
        }
    }
    let mut instructions: Vec<(Op, [usize; 3])> = Vec::new();
    let mut results: HashMap<StorageId, usize> = HashMap::new();
    let mut stores: Vec<(usize, Static)> = Vec::new();
    for member in &chain {
        let Work::Map(operations) = &member.run else { continue };
        let start = loads.len() + instructions.len();
        for (op, arguments) in operations {
            let mut numbers = arguments.iter().filter_map(|argument| match argument {
                Argument::Input(index) => {
                    let input = member.inputs.get(*index)?.as_ref()?;
                    results
                        .get(&input.storage)
                        .copied()
                        .or_else(|| loads.iter().position(|l| l.storage == input.storage && l.layout == input.layout))
                }
                Argument::Result(index) => Some(start + index),
                Argument::Number(_) => None,
            });
            let first = numbers.next().unwrap_or(0);
            let second = numbers.next().unwrap_or(first);
            let third = numbers.next().unwrap_or(second);
            instructions.push((*op, [first, second, third]));
        }
        if let Some(Some(output)) = member.outputs.first() {
            let result = loads.len() + instructions.len() - 1;
            results.insert(output.storage, result);
            let read_later = last_reader.get(&output.storage).is_some_and(|last| *last >= next);
            if remaining[output.storage] > 0 || read_later {
                stores.push((result, output.clone()));
            }
        }
    }
    let described: Vec<_> = loads.iter().map(|l| (l.layout.clone(), kind(l.dtype))).collect();
    let stored: Vec<_> = stores.iter().map(|(value, output)| (*value, kind(output.dtype))).collect();
    let program = Program::new(&described, &instructions, &stored);
    out.push(TileOp {
        scratch_bytes: program.scratch_bytes(),
        kernel: Box::new(program),
        inputs: loads.iter().map(|l| Some(table.place(l))).collect(),
        outputs: stores.iter().map(|(_, output)| Some(table.place(output))).collect(),
        scale: elements / units,
    });
}

/// What a program takes a value for. Elementwise members have values of known kinds only.
fn kind(dtype: DType) -> Kind {
    Kind::of(dtype).unwrap_or(Kind::F32)
}

/// The kernel of a group.
struct Tiles {
    ops: Vec<TileOp>,
    locals: Vec<Local>,
    units: usize,
    units_per_tile: usize,
    local_bytes: usize,
    worker_bytes: usize,
}

impl Kernel for Tiles {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let inputs = io.inputs;
        let outputs: Vec<Raw> = io.outputs.clone();
        let scratch = Shared::new(io.scratch::<u8>());
        pool.for_each(self.units.div_ceil(self.units_per_tile), |tile| {
            let start = tile * self.units_per_tile;
            let units = start..self.units.min(start + self.units_per_tile);
            let worker = pool.worker() * self.worker_bytes;
            // SAFETY: each worker has a part of its own and runs one tile at a time.
            let memory = unsafe { scratch.range(worker..worker + self.worker_bytes) };
            self.tile(units, inputs, &outputs, memory);
        });
        Ok(())
    }
}

impl Tiles {
    fn tile(&self, units: Range<usize>, inputs: &[Raw], outputs: &[Raw], memory: &mut [u8]) {
        let (locals, scratch) = memory.split_at_mut(self.local_bytes);
        let base = locals.as_mut_ptr();
        let address = |operand: &Option<(Place, usize)>| -> *mut u8 {
            match operand {
                Some((Place::Input(index), offset)) => inputs[*index].ptr.wrapping_add(*offset),
                Some((Place::Output(index), offset)) => outputs[*index].ptr.wrapping_add(*offset),
                Some((Place::Local(index), offset)) => {
                    // Shifted so that the tile's first unit has its usual index.
                    let local = &self.locals[*index];
                    base.wrapping_add(local.offset_bytes + offset).wrapping_sub(units.start * local.unit_bytes)
                }
                None => Raw::NONE.ptr,
            }
        };
        let mut reads: Vec<*const u8> = Vec::new();
        let mut writes: Vec<*mut u8> = Vec::new();
        for op in &self.ops {
            reads.clear();
            reads.extend(op.inputs.iter().map(|operand| address(operand).cast_const()));
            writes.clear();
            writes.extend(op.outputs.iter().map(address));
            op.kernel.run(&mut Tile {
                inputs: &reads,
                outputs: &writes,
                units: units.start * op.scale..units.end * op.scale,
                scratch: &mut *scratch,
            });
        }
    }
}
