//! What each unit alone does to the outputs when it is quantized.
//!
//! A unit's score is the divergence of the outputs, in mean over few samples, when it is quantized and all others are
//! not. It is the plain measurement of what weight errors only guess at, and costs one short run a unit.

use crate::bench::Bench;
use crate::candidate::StaticForm;
use crate::error::CompressError;
use crate::search::UnitSensitivity;
use updraft_passes::quantize::{prepare, units};

/// The sensitivities of the original's units, in execution order.
pub fn measure(bench: &mut Bench, form: &StaticForm) -> Result<Vec<UnitSensitivity>, CompressError> {
    let mut prepared = bench.original().clone();
    prepare(&mut prepared)?;
    let units = units(&prepared)?;
    let names: Vec<String> = units.iter().map(|u| u.node.clone()).collect();
    let total: u64 = units.iter().filter_map(|u| u.flops).sum();
    units
        .iter()
        .map(|unit| {
            Ok(UnitSensitivity {
                unit: unit.node.clone(),
                op: unit.op.clone(),
                // A unit of unknown work counts for none: it is the first to go back to float.
                flops_share: unit.flops.unwrap_or(0) as f64 / total.max(1) as f64,
                divergence: bench.divergence_of_units(form, &names, &unit.node)?,
            })
        })
        .collect()
}
