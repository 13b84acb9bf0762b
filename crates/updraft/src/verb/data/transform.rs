//! `updraft data transform`: SQL and steps on a dataset, here or on a cluster.

use std::path::PathBuf;

use super::parse_bytes;

/// Make a dataset of another, by a recipe: SQL, then steps on pictures and text, then shards with a manifest
///
/// The recipe is TOML: `source` and `target`, `sql` (a query of the table `data`, which is the source), `[[steps]]` with
/// `resize`, `decode` or `tokenize`, and `[write]` with `format`, `shard_bytes` or `shard_rows`, and `compress`.
///
/// Rows are cut into units, each of which becomes one shard; a query that groups, orders, joins or limits rows needs all of
/// them and is one unit, and the answer says so. A shard is named by the digest of all that determines it, and put only
/// where it does not exist: a run that was killed goes on where it was, any unit may be done twice, and every way ends in
/// the same bytes and the same version.
///
/// Needs a build with `--features query`, and `--features cluster` for `--cluster`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe.
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,

    /// Have the units done by a Ballista cluster, whose executors are started with `updraft data cluster executor`. Source,
    /// target and files of tokenizers must be there under the same names for all of them.
    #[arg(long, value_name = "ballista://HOST:PORT")]
    cluster: Option<String>,

    /// The most memory of each process; fewer units are done at the same time where it is short.
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = parse_bytes)]
    memory: u64,
}

pub(crate) use engine::run;

#[cfg(not(feature = "query"))]
mod engine {
    use super::Args;
    use crate::context::{Answer, Context};
    use crate::failure::Failure;
    use crate::verb::data::query::no_engine;

    pub(crate) fn run(_: &Args, _: &Context) -> Result<Answer, Failure> {
        Err(no_engine())
    }
}

#[cfg(feature = "query")]
mod engine {
    use std::path::absolute;
    use std::sync::Arc;

    use serde_json::json;
    use updraft_base::units;
    use updraft_query::{Transform, Transformed, Workplace};

    use super::Args;
    use crate::context::{Answer, Context};
    use crate::failure::{Failure, Kind};
    use crate::recipe;
    use crate::verb::data::read_text;

    pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
        let path = &args.recipe;
        let recipe = recipe::parse_transform(&read_text(path)?, path)?;
        // Executors do not run in this folder.
        let whole = absolute(path).map_err(|e| Failure::io("read", path, &e))?;
        let recipe =
            recipe.below(whole.parent().unwrap_or(&whole)).map_err(|reason| Failure::new(Kind::Usage, reason))?;
        let address = args.cluster.as_deref().map(cluster::address).transpose()?;
        let workplace = Workplace { access: context.access(), threads: context.threads };
        let (source, target, format) = (recipe.source.clone(), recipe.target.clone(), recipe.write.format);
        let transform =
            Arc::new(Transform::open(recipe, args.memory, workplace).map_err(|e| Failure::from(e).about(path))?);
        let start_ns = context.clock.monotonic_ns();
        let task = context.progress.task("transform", transform.rows(), "rows");
        let show = |done: u64, _| task.at(done, String::new);
        let transformed = match &address {
            None => transform.run(show)?,
            Some(address) => cluster::run(&transform, address, context, show)?,
        };
        task.finish();
        let elapsed_ns = context.clock.monotonic_ns() - start_ns;
        let Transformed { ingested, version, units: unit_count, empty_units, whole_because } = transformed;
        let bytes: u64 = ingested.shards.iter().map(|shard| shard.bytes).sum();
        let (count, made) = (ingested.shards.len() as u64, ingested.made);
        let mut text = format!("{} rows in {count} shards of {format}, {}\n", ingested.rows, units::bytes(bytes));
        match &whole_because {
            Some(reason) => text.push_str(&format!("1 unit of all rows, because of the query: {reason}\n")),
            None => text.push_str(&format!("{unit_count} units, {empty_units} of them with no row left\n")),
        }
        text.push_str(&format!("{made} made, {} found\n", count - made));
        text.push_str(&format!("{}\nversion {version}\n", units::duration_ns(elapsed_ns)));
        let json = json!({
            "source": source, "target": target, "format": format, "rows": ingested.rows, "bytes": bytes,
            "units": unit_count, "empty_units": empty_units, "needs_all_rows": whole_because,
            "shards": ingested.shards.iter().map(|shard| &shard.key).collect::<Vec<_>>(), "made": made,
            "version": version, "elapsed_ns": elapsed_ns,
        });
        Ok(Answer { text, json })
    }

    #[cfg(feature = "cluster")]
    mod cluster {
        use std::sync::Arc;

        use updraft_query::{ClusterAddress, Transform, Transformed};

        use crate::context::Context;
        use crate::failure::{Failure, Kind};

        pub(super) fn address(text: &str) -> Result<ClusterAddress, Failure> {
            ClusterAddress::parse(text).map_err(|reason| Failure::new(Kind::Usage, reason))
        }

        pub(super) fn run(
            transform: &Arc<Transform>,
            address: &ClusterAddress,
            context: &Context,
            show: impl FnMut(u64, u64),
        ) -> Result<Transformed, Failure> {
            Ok(transform.run_on(address, &*context.clock, show)?)
        }
    }

    #[cfg(not(feature = "cluster"))]
    mod cluster {
        use std::sync::Arc;

        use updraft_query::{Transform, Transformed};

        use crate::context::Context;
        use crate::failure::Failure;
        use crate::verb::data::cluster::no_cluster;

        /// None can be named.
        pub(super) enum Address {}

        pub(super) fn address(_: &str) -> Result<Address, Failure> {
            Err(no_cluster())
        }

        pub(super) fn run(
            _: &Arc<Transform>,
            address: &Address,
            _: &Context,
            _: impl FnMut(u64, u64),
        ) -> Result<Transformed, Failure> {
            match *address {}
        }
    }
}
