//! Transformations on a Ballista cluster, and the processes of one.
//!
//! # Design
//!
//! Ballista hands out tasks, notices lost executors and hands their tasks to others. What is sent is the plan of the units
//! ([`UnitsExec`]) with the job as text; executors open the job by themselves, with their own credentials, and answer with
//! a row for each unit. Nothing depends on the engine's recovery: a unit is done when its record is in the target, so
//! the coordinator asks the target, and sends again what has no record, until all have one or nothing moves any more.
//!
//! Executors ask for work, rather than being called: only the port that answers are fetched from need be open.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use ballista_core::config::{BALLISTA_SCHEDULER_MAX_PARTITIONS_PER_TASK, BallistaConfig, TaskSchedulingPolicy};
use ballista_core::execution_plans::execute_physical_plan;
use ballista_core::extension::SessionConfigExt;
use ballista_core::serde::BallistaPhysicalExtensionCodec;
use ballista_executor::executor_process::{ExecutorProcessConfig, start_executor_process};
use ballista_scheduler::cluster::BallistaCluster;
use ballista_scheduler::config::SchedulerConfig;
use ballista_scheduler::scheduler_process::{create_scheduler, start_grpc_service_with_listener};
use datafusion::arrow::array::RecordBatch;
use datafusion::common::{DataFusionError, Result};
use datafusion::execution::TaskContext;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::prelude::SessionConfig;
use datafusion_proto::physical_plan::{PhysicalExtensionCodec, PhysicalProtoConverterExtension};
use datafusion_proto::protobuf::{LogicalPlanNode, PhysicalPlanNode};
use futures_util::TryStreamExt;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use updraft_base::{Clock, nearest};

use crate::error::QueryError;
use crate::transform::plan::{Outcome, UnitsExec, Worker, outcomes, plan_of};
use crate::transform::{Done, Transform, Transformed, Workplace};

/// The port of a scheduler whose address names none: Ballista's own.
const PORT: u16 = 50050;

/// Units that are sent at once: their numbers are a message of less than a megabyte, where 16 are allowed.
const ROUND_UNITS: usize = 1024;

/// Rounds in a row after which no unit more was done, before that is an error.
const TRIES: u32 = 3;

/// The wait after the first of them; it doubles with each.
const PAUSE_MS: u64 = 500;

/// How long a scheduler may take to answer at all.
const REACH_MS: u64 = 10_000;

/// Notes of an executor that wait to be shown.
const NOTES: usize = 64;

/// How often an executor that has nothing to say looks whether it has ended.
const NOTES_MS: u64 = 100;

/// How long an executor that is asked to stop may go on with its units.
const GRACE_MS: u64 = 5_000;

/// A scheduler's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterAddress {
    /// The host, by name or number.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl ClusterAddress {
    /// Reads `ballista://HOST:PORT`, or the same without the scheme or the port.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> std::result::Result<ClusterAddress, String> {
        let rest = match text.split_once("://") {
            Some(("ballista", rest)) => rest,
            Some((scheme, _)) => {
                let hint =
                    nearest(scheme, ["ballista"]).map_or(String::new(), |known| format!(", did you mean `{known}`?"));
                return Err(format!("`{scheme}` is no kind of cluster{hint}; known here: ballista"));
            }
            None => text,
        };
        let (host, port) = match rest.trim_end_matches('/').rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|port| *port > 0)),
            None => (rest.trim_end_matches('/'), Some(PORT)),
        };
        match port {
            Some(port) if !host.is_empty() && !host.contains('/') => Ok(ClusterAddress { host: host.to_owned(), port }),
            _ => Err(format!("`{text}` is not of the form ballista://HOST:PORT")),
        }
    }

    /// Waits until something answers there: what the engine says about an address where nothing does is hard to read.
    fn reach(&self, patience_ms: u64, clock: &dyn Clock) -> std::result::Result<(), QueryError> {
        let start_ns = clock.monotonic_ns();
        loop {
            let tried = (self.host.as_str(), self.port).to_socket_addrs().and_then(|mut addresses| {
                let address = addresses.next();
                let address = address.ok_or_else(|| std::io::Error::other("the name has no address"))?;
                TcpStream::connect_timeout(&address, Duration::from_millis(REACH_MS))
            });
            let Err(error) = tried else { return Ok(()) };
            if (clock.monotonic_ns() - start_ns) / 1_000_000 >= patience_ms {
                return Err(cluster(format!("no scheduler answers at {self}: {error}")));
            }
            clock.sleep_ms(100);
        }
    }
}

impl fmt::Display for ClusterAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ballista://{}:{}", self.host, self.port)
    }
}

fn cluster(reason: String) -> QueryError {
    QueryError::Cluster { reason }
}

impl Transform {
    /// Runs it on a cluster. What was done before is found, whoever did it; `progress` is told of the rows that are done and
    /// of all.
    ///
    /// # Errors
    /// A unit that cannot be done; units that nobody did in several tries; a scheduler that does not answer.
    pub fn run_on(
        self: &Arc<Transform>,
        address: &ClusterAddress,
        clock: &dyn Clock,
        mut progress: impl FnMut(u64, u64),
    ) -> std::result::Result<Transformed, QueryError> {
        let count = self.units();
        let mut done: BTreeMap<usize, Done> = BTreeMap::new();
        let look = |units: &[usize], done: &mut BTreeMap<usize, Done>, is_made: bool| {
            for (unit, mut found) in self.found_all(units)? {
                found.units.iter_mut().for_each(|unit| unit.is_made = is_made && unit.shard.is_some());
                done.insert(unit, found);
            }
            Ok::<_, QueryError>(())
        };
        look(&(0..count).collect::<Vec<_>>(), &mut done, false)?;
        let total = self.rows();
        let rows = |done: &BTreeMap<usize, Done>| done.keys().map(|unit| self.unit_rows(*unit)).sum();
        progress(rows(&done), total);
        let (mut tries, mut last) = (0, String::from("the cluster said that it was done"));
        while done.len() < count {
            let round: Vec<usize> = (0..count).filter(|unit| !done.contains_key(unit)).take(ROUND_UNITS).collect();
            let before = done.len();
            match self.round(address, &round, clock) {
                Ok(outcomes) => {
                    // The first in their order, as in process; answers come in the order of executors.
                    let failed = outcomes.into_iter().filter_map(|(unit, outcome)| match outcome {
                        Outcome::Failed { reason, is_store } => Some((unit, QueryError::Unit { reason, is_store })),
                        Outcome::Done(_) => None,
                    });
                    if let Some((_, error)) = failed.min_by_key(|(unit, _)| *unit) {
                        return Err(error);
                    }
                }
                Err(error) => last = error.to_string(),
            }
            // What the cluster answered is not looked at: an executor that was lost took its answers along, not its work.
            look(&round, &mut done, true)?;
            progress(rows(&done), total);
            tries = if done.len() > before { 0 } else { tries + 1 };
            if tries == TRIES {
                let missing: Vec<String> = round.iter().take(8).map(usize::to_string).collect();
                let more = if round.len() > 8 { ", …" } else { "" };
                return Err(cluster(format!(
                    "units {}{more} were not done in {TRIES} tries at {address}: {last}",
                    missing.join(", ")
                )));
            }
            if tries > 0 {
                clock.sleep_ms(PAUSE_MS << (tries - 1));
            }
        }
        self.finish(done.into_values().collect())
    }

    /// Has units done by the cluster: what came of those whose answers could be fetched.
    fn round(
        self: &Arc<Transform>,
        address: &ClusterAddress,
        units: &[usize],
        clock: &dyn Clock,
    ) -> std::result::Result<Vec<(usize, Outcome)>, QueryError> {
        address.reach(REACH_MS, clock)?;
        let (plan, _) = plan_of(self, units)?;
        // A task for each unit, so that one that is lost takes no others along.
        let config = session().set_usize(BALLISTA_SCHEDULER_MAX_PARTITIONS_PER_TASK, 1);
        let session = format!("updraft-{}-{}", clock.now_unix_ms(), std::process::id());
        let url = format!("http://{}:{}", address.host, address.port);
        let codec = Codec::new(None);
        let answer = async {
            let settings = BallistaConfig::default();
            let stream =
                execute_physical_plan::<PhysicalPlanNode>(url, &settings, plan, &codec, session, config).await?;
            stream.try_collect::<Vec<RecordBatch>>().await
        };
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|e| cluster(e.to_string()))?;
        let batches = runtime.block_on(answer).map_err(|error| cluster(error.to_string()))?;
        batches.iter().try_fold(Vec::new(), |mut all, batch| {
            all.extend(outcomes(batch)?);
            Ok(all)
        })
    }
}

fn session() -> SessionConfig {
    SessionConfig::new_with_ballista()
}

/// A scheduler.
#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// Where it listens.
    pub bind: SocketAddr,
    /// The time without a word from an executor after which its tasks are given to others.
    pub executor_timeout_seconds: u64,
}

/// Runs a scheduler until the process is asked to stop. `ready` is told the address when it is taken.
///
/// # Errors
/// An address that is taken.
pub fn run_scheduler(
    options: &SchedulerOptions,
    ready: impl FnOnce(SocketAddr),
) -> std::result::Result<(), QueryError> {
    let listener = listen(options.bind)?;
    let address = listener.local_addr().map_err(|e| cluster(e.to_string()))?;
    let timeout_seconds = options.executor_timeout_seconds;
    let config = SchedulerConfig {
        bind_host: address.ip().to_string(),
        bind_port: address.port(),
        external_host: address.ip().to_string(),
        scheduling_policy: TaskSchedulingPolicy::PullStaged,
        executor_timeout_seconds: timeout_seconds,
        no_executors_grace_period_seconds: timeout_seconds,
        expire_dead_executor_interval_seconds: (timeout_seconds / 4).clamp(1, 15),
        override_config_producer: Some(Arc::new(session)),
        override_physical_codec: Some(Arc::new(Codec::new(None))),
        ..SchedulerConfig::default()
    };
    server_runtime()?.block_on(async {
        let failed = |e: ballista_core::error::BallistaError| cluster(e.to_string());
        let config = Arc::new(config);
        let state = BallistaCluster::new_from_config(&config).await.map_err(failed)?;
        let scheduler = create_scheduler::<LogicalPlanNode, PhysicalPlanNode>(state, config).await.map_err(failed)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(|e| cluster(e.to_string()))?;
        let mut stop = Stop::listen()?;
        ready(address);
        tokio::select! {
            ended = start_grpc_service_with_listener(listener, scheduler) => ended.map_err(failed),
            () = stop.asked() => Ok(()),
        }
    })
}

/// An executor.
#[derive(Debug, Clone)]
pub struct ExecutorOptions {
    /// The scheduler that it works for.
    pub scheduler: ClusterAddress,
    /// Where it listens for those who fetch answers; port 0 takes a free one.
    pub bind: SocketAddr,
    /// The host by which others reach it; without it, the address from which the scheduler sees it.
    pub host: Option<String>,
    /// How long it waits for the scheduler to be there.
    pub patience_ms: u64,
}

/// Runs an executor until the process is asked to stop. `note` is told of what it does.
///
/// # Errors
/// A scheduler that does not answer, an address that is taken.
pub fn run_executor(
    options: &ExecutorOptions,
    workplace: Workplace,
    clock: &dyn Clock,
    mut note: impl FnMut(&str),
) -> std::result::Result<(), QueryError> {
    // The engine binds it itself and does not say why it could not.
    let address = listen(options.bind)?.local_addr().map_err(|e| cluster(e.to_string()))?;
    options.scheduler.reach(options.patience_ms, clock)?;
    let folder = tempfile::tempdir().map_err(|e| cluster(format!("no folder for answers: {e}")))?;
    let work_dir =
        folder.path().to_str().ok_or_else(|| cluster("the temporary folder is not UTF-8".into()))?.to_owned();
    let tasks = workplace.threads;
    let (sender, notes) = sync_channel(NOTES);
    let worker = Arc::new(Worker::new(workplace, sender));
    let config = ExecutorProcessConfig {
        bind_host: address.ip().to_string(),
        external_host: options.host.clone(),
        port: address.port(),
        scheduler_host: options.scheduler.host.clone(),
        scheduler_port: options.scheduler.port,
        vcores: tasks,
        task_scheduling_policy: TaskSchedulingPolicy::PullStaged,
        work_dir: Some(work_dir),
        // Units bound their memory themselves.
        memory_pool_size: Some(0),
        override_config_producer: Some(Arc::new(session)),
        override_physical_codec: Some(Arc::new(Codec::new(Some(worker)))),
        ..ExecutorProcessConfig::default()
    };
    let runtime = server_runtime()?;
    let stop = runtime.block_on(async { Stop::listen() })?;
    let run = move || {
        let ended = runtime.block_on(executor(config, stop));
        // Units that go on are not waited for.
        runtime.shutdown_background();
        ended
    };
    let thread = std::thread::Builder::new().name("updraft-executor".into()).spawn(run);
    let thread = thread.map_err(|e| cluster(e.to_string()))?;
    note(&format!("executor at {address} for {}, {tasks} at a time", options.scheduler));
    loop {
        match notes.recv_timeout(Duration::from_millis(NOTES_MS)) {
            Ok(line) => note(&line),
            Err(RecvTimeoutError::Timeout) if !thread.is_finished() => {}
            Err(_) => break,
        }
    }
    thread.join().map_err(|_| cluster("the executor panicked".into()))?
}

/// Runs until asked to stop.
async fn executor(config: ExecutorProcessConfig, mut stop: Stop) -> std::result::Result<(), QueryError> {
    let process = start_executor_process(Arc::new(config));
    tokio::pin!(process);
    tokio::select! {
        biased;
        () = stop.asked() => {
            // It hears the same, tells the scheduler, and finds an end to its units; one that had not begun to listen hears
            // nothing. What is cut off is done by others.
            match tokio::time::timeout(Duration::from_millis(GRACE_MS), process).await {
                Ok(ended) => ended.map_err(|error| cluster(error.to_string())),
                Err(_) => Ok(()),
            }
        }
        ended = &mut process => match ended {
            Err(error) => Err(cluster(error.to_string())),
            Ok(()) => Err(cluster("the executor ended: it can no longer take tasks or give answers".into())),
        },
    }
}

fn listen(address: SocketAddr) -> std::result::Result<TcpListener, QueryError> {
    let listener = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|e| cluster(format!("cannot listen at {address}: {e}")))
}

fn server_runtime() -> std::result::Result<Runtime, QueryError> {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(|e| cluster(e.to_string()))
}

/// The keyboard and the system, which ask for an end; heard from when this is made.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    /// Begins to listen, within a runtime.
    fn listen() -> std::result::Result<Stop, QueryError> {
        let signal = |kind| signal(kind).map_err(|e| cluster(format!("cannot listen for signals: {e}")));
        Ok(Stop { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// What our plan begins with. No message of Ballista does: 255 begins no field.
const MARK: &[u8] = b"\xffupdraft units 1\n";

/// Our plan as a message, and Ballista's own.
struct Codec {
    worker: Option<Arc<Worker>>,
    others: BallistaPhysicalExtensionCodec,
}

impl Codec {
    fn new(worker: Option<Arc<Worker>>) -> Codec {
        Codec { worker, others: BallistaPhysicalExtensionCodec::default() }
    }
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Codec").field("does_units", &self.worker.is_some()).finish_non_exhaustive()
    }
}

impl PhysicalExtensionCodec for Codec {
    fn try_decode(
        &self,
        message: &[u8],
        inputs: &[Arc<dyn ExecutionPlan>],
        context: &TaskContext,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let Some(job) = message.strip_prefix(MARK) else {
            return self.others.try_decode(message, inputs, context, converter);
        };
        let wrong = |what: &str| DataFusionError::Plan(format!("a plan of units {what}"));
        let job = std::str::from_utf8(job).map_err(|_| wrong("is not text"))?;
        let [input] = inputs else { return Err(wrong("has not one input")) };
        Ok(Arc::new(UnitsExec::new(job.into(), self.worker.clone(), input.clone())))
    }

    fn try_encode(
        &self,
        node: Arc<dyn ExecutionPlan>,
        message: &mut Vec<u8>,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> Result<()> {
        match node.downcast_ref::<UnitsExec>() {
            Some(units) => {
                message.extend_from_slice(MARK);
                message.extend_from_slice(units.job().as_bytes());
                Ok(())
            }
            None => self.others.try_encode(node, message, converter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ClusterAddress;

    #[test]
    fn addresses_have_a_host_a_scheme_that_is_known_and_a_port() {
        let address = |host: &str, port| Ok(ClusterAddress { host: host.to_owned(), port });
        assert_eq!(ClusterAddress::parse("ballista://10.0.0.1:5000"), address("10.0.0.1", 5000));
        assert_eq!(ClusterAddress::parse("ballista://scheduler/"), address("scheduler", 50050));
        assert_eq!(ClusterAddress::parse("scheduler:81"), address("scheduler", 81));
        for (text, expected) in [
            ("balista://x:1", "did you mean `ballista`?"),
            ("spark://x:1", "known here: ballista"),
            ("ballista://:1", "HOST:PORT"),
            ("ballista://x:0", "HOST:PORT"),
            ("ballista://x:port", "HOST:PORT"),
        ] {
            let error = ClusterAddress::parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
