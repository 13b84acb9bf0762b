//! `updraft data cluster`: the processes of a Ballista cluster that transforms datasets.

use std::net::SocketAddr;

use clap::Subcommand;

/// Run the processes of a cluster for `data transform --cluster`
///
/// One scheduler, and any number of executors on any machines, which ask it for work. A client sends what is to be done, never
/// credentials: executors reach stores by the environment they are started in. There is no authentication between them, so
/// the ports belong into a private network.
///
/// Needs a build with `--features cluster`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Hand out units to executors, until stopped
    Scheduler(SchedulerArgs),
    /// Do units that a scheduler hands out, until stopped: `--threads` at a time
    Executor(ExecutorArgs),
}

#[derive(Debug, clap::Args)]
struct SchedulerArgs {
    /// Where it listens; port 0 takes a free one.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:50050")]
    bind: SocketAddr,

    /// The time without a word from an executor after which its units are given to others. Executors that are busy say a
    /// word every 5 seconds.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(6..))]
    executor_timeout_seconds: u64,
}

#[derive(Debug, clap::Args)]
struct ExecutorArgs {
    /// The scheduler.
    #[arg(long, value_name = "ballista://HOST:PORT")]
    scheduler: String,

    /// Where it listens for those who fetch answers; port 0 takes a free one.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    bind: SocketAddr,

    /// The host by which clients reach it [default: the address from which the scheduler sees it].
    #[arg(long, value_name = "NAME")]
    host: Option<String>,

    /// How long it waits for the scheduler to be there.
    #[arg(long, value_name = "N", default_value_t = 30)]
    patience_seconds: u64,
}

pub(crate) use engine::run;

#[cfg(all(feature = "query", not(feature = "cluster")))]
pub(super) use engine::no_cluster;

#[cfg(not(feature = "cluster"))]
mod engine {
    use super::Args;
    use crate::context::{Answer, Context};
    use crate::failure::{Failure, Kind};

    pub(crate) fn run(_: &Args, _: &Context) -> Result<Answer, Failure> {
        Err(no_cluster())
    }

    pub(in super::super) fn no_cluster() -> Failure {
        let failure = Failure::new(Kind::Unsupported, "this build knows no clusters");
        failure.hint("build it in: cargo install --path crates/updraft --features cluster")
    }
}

#[cfg(feature = "cluster")]
mod engine {
    use serde_json::json;
    use updraft_query::{ClusterAddress, ExecutorOptions, SchedulerOptions, Workplace, run_executor, run_scheduler};

    use super::{Args, Role};
    use crate::context::{Answer, Context};
    use crate::failure::{Failure, Kind};

    pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
        let role = match &args.role {
            Role::Scheduler(args) => {
                let options =
                    SchedulerOptions { bind: args.bind, executor_timeout_seconds: args.executor_timeout_seconds };
                run_scheduler(&options, |address| {
                    context.progress.note(&format!("scheduler at ballista://{address}"));
                })?;
                "scheduler"
            }
            Role::Executor(args) => {
                let scheduler = ClusterAddress::parse(&args.scheduler);
                let options = ExecutorOptions {
                    scheduler: scheduler.map_err(|reason| Failure::new(Kind::Usage, reason))?,
                    bind: args.bind,
                    host: args.host.clone(),
                    patience_ms: args.patience_seconds.saturating_mul(1000),
                };
                let workplace = Workplace { access: context.access(), threads: context.threads };
                run_executor(&options, workplace, &*context.clock, |line| context.progress.note(line))?;
                "executor"
            }
        };
        Ok(Answer { text: format!("the {role} was stopped\n"), json: json!({ "role": role, "stopped": true }) })
    }
}
