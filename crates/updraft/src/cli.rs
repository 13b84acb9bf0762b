//! The arguments: what all verbs share, and the list of verbs. The doc comments of the argument structs are the manual.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use updraft_base::Clock;
use updraft_data::CacheOptions;

use crate::context::{Answer, Caches, Context};
use crate::failure::Failure;
use crate::verb::data::parse_bytes;
use crate::verb::{
    bench, data, distill, eval, generate, infer, inspect, lineage, new, optimize, prune, quantize, run, train,
};

/// Trains, evaluates and runs neural networks on ONNX models.
///
/// Everything that lasts is kept as an artifact in the store: bytes named by their digest, with a manifest of what they
/// came from. The same recipe, data and seed give the same bits, whatever the number of threads.
#[derive(Debug, Parser)]
#[command(name = "updraft", version, max_term_width = 100)]
pub struct Cli {
    /// What all verbs share.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What all verbs share.
#[derive(Debug, Args)]
pub struct Global {
    /// The artifact store: a folder, made where it does not exist, or a URL as s3://bucket.
    #[arg(long, global = true, value_name = "DIR|URL", default_value = ".updraft", help_heading = "Everywhere")]
    pub store: String,

    /// Print the answer as one JSON object on standard output, errors too.
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,

    /// Threads to compute with [default: one for each processor]. Results do not depend on it.
    #[arg(long, global = true, value_name = "N", help_heading = "Everywhere")]
    pub threads: Option<NonZeroUsize>,

    /// Seed of everything drawn at random, instead of the recipe's.
    #[arg(long, global = true, value_name = "N", help_heading = "Everywhere")]
    pub seed: Option<u64>,

    /// Memory for objects of datasets that will be read again, for each dataset.
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_bytes, help_heading = "Cache of data")]
    pub cache_memory: Option<u64>,

    /// A folder on a fast disk for such objects. Processes may share it.
    #[arg(long, global = true, value_name = "DIR", requires = "cache_disk_limit", help_heading = "Cache of data")]
    pub cache_disk: Option<PathBuf>,

    /// The most that the folder may take.
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_bytes, requires = "cache_disk", help_heading = "Cache of data")]
    pub cache_disk_limit: Option<u64>,

    /// A Redis server near by that keeps small objects and ranges for all machines around it:
    /// redis://\[user:password@\]host\[:port\]. While it is away, the store is asked. Needs a build with the feature `redis`.
    #[arg(long, global = true, value_name = "URL", help_heading = "Cache of data")]
    pub cache_redis: Option<String>,
}

impl Global {
    /// What is kept of the objects that are read; `None` where nothing is.
    ///
    /// # Errors
    /// A server in a build without Redis.
    pub fn caches(&self, clock: Arc<dyn Clock>) -> Result<Option<Caches>, Failure> {
        let (near, redis) = (self.near_cache(), self.cache_redis.as_deref());
        let is_asked = near.is_some() || redis.is_some();
        is_asked.then(|| Caches::new(near, redis, clock)).transpose()
    }

    fn near_cache(&self) -> Option<CacheOptions> {
        let disk = self.cache_disk.clone().zip(self.cache_disk_limit);
        let is_asked = disk.is_some() || self.cache_memory.is_some();
        let defaults = CacheOptions::default();
        let memory_bytes = self.cache_memory.unwrap_or(defaults.memory_bytes);
        is_asked.then_some(CacheOptions { memory_bytes, disk, ..defaults })
    }
}

/// One verb and its arguments.
#[derive(Debug, Subcommand)]
#[allow(missing_docs, reason = "each variant is documented by its arguments")]
pub enum Verb {
    New(new::Args),
    Inspect(inspect::Args),
    Train(train::Args),
    Distill(distill::Args),
    Prune(prune::Args),
    Quantize(quantize::Args),
    Eval(eval::Args),
    Infer(infer::Args),
    Bench(bench::Args),
    Data(data::Args),
    Generate(generate::Args),
    Optimize(optimize::Args),
    Run(run::Args),
    Lineage(lineage::Args),
}

impl Verb {
    /// Does it, and says what that asked of remote stores.
    pub fn run(&self, context: &Context) -> Result<Answer, Failure> {
        let mut done = self.answer(context);
        match &mut done {
            Ok(answer) => context.requests.add_to(answer),
            Err(Failure { answer: Some(answer), .. }) => context.requests.add_to(answer),
            Err(_) => (),
        }
        done
    }

    fn answer(&self, context: &Context) -> Result<Answer, Failure> {
        match self {
            Verb::New(args) => new::run(args, context),
            Verb::Inspect(args) => inspect::run(args, context),
            Verb::Train(args) => train::run(args, context),
            Verb::Distill(args) => distill::run(args, context),
            Verb::Prune(args) => prune::run(args, context),
            Verb::Quantize(args) => quantize::run(args, context),
            Verb::Eval(args) => eval::run(args, context),
            Verb::Infer(args) => infer::run(args, context),
            Verb::Bench(args) => bench::run(args, context),
            Verb::Data(args) => data::run(args, context),
            Verb::Generate(args) => generate::run(args, context),
            Verb::Optimize(args) => optimize::run(args, context),
            Verb::Run(args) => run::run(args, context),
            Verb::Lineage(args) => lineage::run(args, context),
        }
    }
}
