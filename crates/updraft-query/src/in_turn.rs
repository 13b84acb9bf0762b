//! `union all` in the order in which it is written.
//!
//! DataFusion gives each part of a union a partition of its own, and takes rows from partitions as they come. Every union is
//! put below a plan that takes its parts one after the other, before the planner distributes anything.

use std::fmt;
use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::common::{DataFusionError, Result};
use datafusion::execution::TaskContext;
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::union::UnionExec;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties, SendableRecordBatchStream,
};
use futures_util::{TryStreamExt, stream};

/// Puts unions in turn.
#[derive(Debug)]
pub(crate) struct UnionsInTurn;

impl PhysicalOptimizerRule for UnionsInTurn {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let in_turn = |plan: Arc<dyn ExecutionPlan>| match plan.is::<UnionExec>() {
            true => Ok(Transformed::yes(Arc::new(InTurn::new(plan)) as Arc<dyn ExecutionPlan>)),
            false => Ok(Transformed::no(plan)),
        };
        plan.transform_up(in_turn).data()
    }

    fn name(&self) -> &'static str {
        "unions_in_turn"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// The input of a plan that has one.
pub(crate) fn only(children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
    let only = <[_; 1]>::try_from(children);
    only.map(|[input]| input).map_err(|children| DataFusionError::Plan(format!("{} inputs for one", children.len())))
}

/// The partitions of its input, one after the other.
#[derive(Debug)]
struct InTurn {
    input: Arc<dyn ExecutionPlan>,
    properties: Arc<PlanProperties>,
}

impl InTurn {
    fn new(input: Arc<dyn ExecutionPlan>) -> InTurn {
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(input.schema()),
            Partitioning::UnknownPartitioning(1),
            input.properties().emission_type,
            input.properties().boundedness,
        ));
        InTurn { input, properties }
    }
}

impl DisplayAs for InTurn {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InTurn")
    }
}

impl ExecutionPlan for InTurn {
    fn name(&self) -> &'static str {
        "InTurn"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(InTurn::new(only(children)?)))
    }

    fn execute(&self, _: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let (input, count) = (self.input.clone(), self.input.properties().output_partitioning().partition_count());
        // One is begun when the one before has ended: a scan reads ahead from when it is begun.
        let parts = stream::iter((0..count).map(Ok));
        let batches = parts.and_then(move |part| {
            let begun = input.execute(part, context.clone());
            async move { begun }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.input.schema(), batches.try_flatten())))
    }
}
