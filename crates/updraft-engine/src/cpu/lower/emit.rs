//! Work of lowered nodes on its way to becoming steps: collected in open groups for as long as what is added depends on
//! the same tile, and closed when somebody outside needs what a group makes.

use updraft_graph::{DType, OpError, Tensor, ValueId};

use super::{Lowering, Static};
use crate::cpu::build::{Built, Run};
use crate::cpu::elementwise::Op;
use crate::cpu::group::{Group, Member, Work};
use crate::cpu::layout::Layout;
use crate::cpu::map::Argument;
use crate::cpu::step::{Place, Step, StepRun, StorageId};

impl Lowering<'_> {
    /// Adds elementwise work; inputs are already stretched to the output's shape.
    pub(crate) fn add_map(
        &mut self,
        label: String,
        op: String,
        mut inputs: Vec<Option<Static>>,
        made: Static,
        operations: &[(Op, Vec<Argument>)],
    ) {
        let mut resolved = Vec::with_capacity(operations.len());
        for (op, arguments) in operations {
            let mut out = Vec::with_capacity(arguments.len());
            for argument in arguments {
                out.push(match argument {
                    Argument::Number(number) => {
                        let storage = self.number(*number);
                        let layout = Layout::contiguous(&[]).broadcast_to(&made.layout.shape);
                        inputs.push(Some(Static { storage, dtype: DType::F32, layout }));
                        Argument::Input(inputs.len() - 1)
                    }
                    other => *other,
                });
            }
            resolved.push((*op, out));
        }
        let member = Member {
            label,
            op,
            aligned: (0..inputs.len()).collect(),
            inputs,
            axes: made.layout.shape.len(),
            outputs: vec![Some(made)],
            work: 2 + operations.len(),
            units_min: 1,
            scratch_bytes: 0,
            run: Work::Map(resolved),
        };
        self.join(member, true);
    }

    fn number(&mut self, number: f32) -> StorageId {
        if let Some(storage) = self.numbers.get(&number.to_bits()) {
            return *storage;
        }
        let storage = self.add_storage(size_of::<f32>(), Place::Constant(Tensor::scalar(number)));
        self.numbers.insert(number.to_bits(), storage);
        storage
    }

    /// Adds a kernel's work on values, all of which but the `strided` ones it reads contiguous.
    pub(crate) fn add_kernel(
        &mut self,
        label: String,
        op: String,
        operands: &[Option<ValueId>],
        results: &[Option<ValueId>],
        built: Built,
        strided: &[usize],
    ) -> Result<(), OpError> {
        let mut inputs = Vec::new();
        for (index, value) in operands.iter().enumerate() {
            inputs.push(match value {
                Some(v) if strided.contains(&index) => Some(self.fixed(*v)?),
                Some(v) => Some(self.contiguous(*v)?),
                None => None,
            });
        }
        // Only now: making one input contiguous may have moved another that is the same value.
        for (index, value) in operands.iter().enumerate() {
            if let Some(v) = value
                && !strided.contains(&index)
            {
                inputs[index] = Some(self.fixed(*v)?);
            }
        }
        let mut outputs = Vec::new();
        for value in results {
            outputs.push(value.and_then(|v| {
                let (dtype, shape) = self.facts(v)?;
                Some(self.make(v, dtype, Layout::contiguous(&shape)))
            }));
        }
        self.add_built(label, op, inputs, outputs, built);
        Ok(())
    }

    /// Adds a kernel's work.
    pub(crate) fn add_built(
        &mut self,
        label: String,
        op: String,
        inputs: Vec<Option<Static>>,
        outputs: Vec<Option<Static>>,
        built: Built,
    ) {
        match built.run {
            Run::Whole(kernel) => {
                let makers: Vec<StorageId> = inputs.iter().flatten().map(|s| s.storage).collect();
                self.close_makers(&makers);
                self.steps.push(Step {
                    label,
                    op,
                    inputs: inputs.iter().map(|s| s.as_ref().map(Static::span)).collect(),
                    outputs: outputs.iter().map(|s| s.as_ref().map(Static::span)).collect(),
                    run: StepRun::Kernel(kernel),
                    scratch_bytes: built.scratch_bytes,
                    in_place: built.in_place,
                });
            }
            Run::Tiled { kernel, axes, work, aligned, units_min, joins } => {
                let (scratch_bytes, run) = (built.scratch_bytes, Work::Kernel(kernel));
                let member = Member { label, op, inputs, aligned, outputs, axes, work, units_min, scratch_bytes, run };
                self.join(member, joins);
            }
        }
    }

    /// Makes steps of the open groups that make these storages.
    pub(super) fn close_makers(&mut self, storages: &[StorageId]) {
        let mut groups: Vec<usize> = storages.iter().filter_map(|s| self.group_of.get(s).copied()).collect();
        groups.sort_unstable();
        groups.dedup();
        groups.into_iter().for_each(|g| self.close(g));
    }

    pub(super) fn close(&mut self, group: usize) {
        let Some(group) = self.groups[group].take() else { return };
        for storage in group.made() {
            self.group_of.remove(&storage);
        }
        let sizes: Vec<usize> = self.storages.iter().map(|s| s.bytes).collect();
        self.steps.push(group.into_step(&sizes, &self.remaining));
    }

    /// Adds work to the open group that makes what it reads, or begins a group.
    pub(super) fn join(&mut self, member: Member, joins: bool) {
        let makers: Vec<usize> =
            member.inputs.iter().flatten().filter_map(|s| self.group_of.get(&s.storage).copied()).collect();
        let newest = makers.iter().copied().max().filter(|_| joins);
        let chosen =
            newest.filter(|g| self.groups[*g].as_ref().is_some_and(|group| group.accepts(&member, &self.storages)));
        for group in makers {
            if Some(group) != chosen {
                self.close(group);
            }
        }
        let made: Vec<StorageId> = member.outputs.iter().flatten().map(|s| s.storage).collect();
        let group = match chosen {
            Some(group) => {
                if let Some(open) = &mut self.groups[group] {
                    open.add(member);
                }
                group
            }
            None => {
                self.groups.push(Some(Group::new(member)));
                self.groups.len() - 1
            }
        };
        made.into_iter().for_each(|s| {
            self.group_of.insert(s, group);
        });
    }
}
