//! Loaders of data: ours and others on the same samples, each in the format it likes best.
//!
//! Every run is a process of its own and takes a number of samples. The cost of a sample is the difference between a long
//! and a short run over the difference of their samples, so that starting interpreters and opening files is left out;
//! what that costs is told by the time of the first batch. CPU time is that of the whole process tree, because others
//! spread their work over processes. Loaders take turns, and medians over rounds are shown.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use crate::{Failure, python};

mod jobs;

/// Options of `bench data`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Only rows of the table whose name contains this.
    #[arg(long, default_value = "")]
    case: String,
    /// Only loaders whose name contains this.
    #[arg(long, default_value = "")]
    loader: String,
    /// Rounds of each loader.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of ours; others have two workers.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// The Python interpreter to use, instead of an environment of some gigabytes made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
    /// The Python interpreter with Apache Beam, likewise.
    #[arg(long)]
    beam_python: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

const PACKAGES: &[&str] = &[
    "datasets==5.0.1",
    "litdata==0.2.76",
    "mosaicml-streaming==0.13.0",
    "pillow==13.0.0",
    "pyarrow==26.0.1",
    "tensorflow-cpu==2.21.0",
    "torch==2.15.0",
    "torchvision==0.29.2",
    "webdataset==1.0.2",
];

/// One row of the table: some work, and who does it.
struct Case {
    name: &'static str,
    /// The dataset, by its name in the script.
    data: &'static str,
    batch: usize,
    sides: &'static [Side],
    /// What the ratio to others must reach, and who they are; others than these only have to be beaten.
    targets: &'static [(&'static str, f64)],
}

/// One loader: `updraft`, or its name in the script.
struct Side {
    loader: &'static str,
    /// Where ours reads; others know.
    format: &'static str,
    /// Samples of the short and of the long run.
    samples: [u64; 2],
}

const fn ours(format: &'static str, samples: [u64; 2]) -> Side {
    Side { loader: OURS, format, samples }
}

const fn other(loader: &'static str, samples: [u64; 2]) -> Side {
    Side { loader, format: "", samples }
}

const OURS: &str = "updraft";

/// So many that what starting takes, which varies by half a CPU second, is little beside the difference.
const PICTURES: [u64; 2] = [64, 6_464];

const CASES: &[Case] = &[
    Case {
        name: "jpeg",
        data: "jpeg",
        batch: 64,
        sides: &[
            ours("folder", [64, 19_264]),
            ours("parquet", [64, 19_264]),
            ours("mds", [64, 19_264]),
            other("tf.data", [64, 9_664]),
            other("pytorch", PICTURES),
            other("mosaic", PICTURES),
            other("webdataset", PICTURES),
            other("litdata", PICTURES),
            other("huggingface", PICTURES),
        ],
        targets: &[("tf.data", 2.2), ("", 4.0)],
    },
    Case {
        name: "raw",
        data: "raw",
        batch: 64,
        sides: &[
            ours("parquet", [6_400, 646_400]),
            ours("mds", [6_400, 646_400]),
            other("tf.data", [640, 64_640]),
            // Its samples are in memory: many, so that the difference is more than its start-up varies.
            other("pytorch", [640, 192_640]),
            other("mosaic", [640, 16_640]),
            other("webdataset", [640, 32_640]),
            other("litdata", [640, 32_640]),
            other("huggingface", [640, 96_640]),
        ],
        targets: &[("", 5.0)],
    },
    Case {
        name: "rows-mds",
        data: "rows",
        batch: 1024,
        sides: &[
            ours("mds", [1_024_000, 21_504_000]),
            ours("parquet", [1_024_000, 21_504_000]),
            other("mosaic", [1_024, 50_176]),
            other("litdata", [1_024, 400_384]),
            other("webdataset", [1_024, 50_176]),
            other("huggingface", [1_024, 200_704]),
        ],
        targets: &[("", 20.0)],
    },
    Case {
        name: "rows-tfrecord",
        data: "rows",
        batch: 1024,
        sides: &[
            ours("tfrecord", [1_024_000, 11_264_000]),
            ours("parquet", [1_024_000, 21_504_000]),
            other("tf.data", [10_240, 502_784]),
        ],
        targets: &[("", 20.0)],
    },
];

/// What one run took.
#[derive(Clone, Copy)]
struct Run {
    wall_s: f64,
    cpu_s: f64,
    first_batch_s: f64,
    samples: f64,
}

/// Medians over rounds.
struct Measured {
    loader: String,
    per_cpu_s: f64,
    per_wall_s: f64,
    start_cpu_s: f64,
    first_batch_s: f64,
}

struct Place<'a> {
    root: &'a Path,
    python: PathBuf,
    script: PathBuf,
    data: PathBuf,
    arguments: &'a Arguments,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let python = match &arguments.python {
        Some(python) => python.clone(),
        None => python::environment(root, "data", PACKAGES)?,
    };
    for built in [["-p", "updraft-data", "--example", "load"], ["-p", "updraft", "--bin", "updraft"]] {
        python::run(Command::new("cargo").current_dir(root).args(["build", "--quiet", "--release"]).args(built))?;
    }
    let script = root.join("xtask/src/bench/data.py");
    let data = root.join("target/bench-data");
    let place = Place { root, python, script, data, arguments };
    let mut report = Vec::new();
    for case in CASES.iter().filter(|c| c.name.contains(&arguments.case)) {
        let measured = place.measure(case)?;
        if !arguments.json {
            show(case, &measured);
        }
        report.push(facts(case, &measured));
    }
    for (name, job) in jobs::JOBS {
        if name.contains(&arguments.case) {
            let (text, facts) = job(&place)?;
            if !arguments.json {
                print!("{text}");
            }
            report.push(facts);
        }
    }
    if arguments.json {
        println!("{:#}", Value::Array(report));
    }
    Ok(())
}

impl Place<'_> {
    /// Writes a dataset in all formats, where it is not yet.
    fn make(&self, data: &str) -> Result<(), Failure> {
        let mut command = Command::new(&self.python);
        python::run_quietly(command.arg(&self.script).args(["make", data]).arg(&self.data))
    }

    fn measure(&self, case: &Case) -> Result<Vec<Measured>, Failure> {
        self.make(case.data)?;
        let chosen: Vec<&Side> =
            case.sides.iter().filter(|s| s.loader == OURS || s.loader.contains(&self.arguments.loader)).collect();
        let mut runs: Vec<Vec<[Run; 2]>> = vec![Vec::new(); chosen.len()];
        let mut failed = vec![false; chosen.len()];
        for _ in 0..self.arguments.rounds {
            for ((side, runs), failed) in chosen.iter().zip(&mut runs).zip(&mut failed) {
                if *failed {
                    continue;
                }
                let pair = |[short, long]: [u64; 2]| Ok([self.take(case, side, short)?, self.take(case, side, long)?]);
                match pair(side.samples) {
                    Ok(pair) => runs.push(pair),
                    // The others can still be compared.
                    Err(failure) => {
                        let failure: Failure = failure;
                        eprintln!("left out: {failure}");
                        *failed = true;
                    }
                }
            }
        }
        let whole = chosen.iter().zip(&runs).zip(&failed).filter(|(_, failed)| !**failed);
        Ok(whole.map(|((side, runs), _)| Measured::of(side, runs)).collect())
    }

    /// One run of one loader.
    fn take(&self, case: &Case, side: &Side, samples: u64) -> Result<Run, Failure> {
        let mut command = if side.loader == OURS {
            let mut command = Command::new(self.root.join("target/release/examples/load"));
            let threads = self.arguments.threads.to_string();
            command.arg(self.recipe(case, side)?).args([&case.batch.to_string(), &samples.to_string(), &threads]);
            command
        } else {
            let mut command = Command::new(&self.python);
            command.arg(&self.script).args(["load", side.loader, case.data]).arg(&self.data).arg(samples.to_string());
            command
        };
        // Others ran since, and the kernel may have let go of files that nobody read for minutes.
        warm(&self.data.join(case.data))?;
        let messages = self.data.join("messages.txt");
        command.stdout(Stdio::piped()).stderr(std::fs::File::create(&messages)?);
        let (cpu, wall, start) = (children_cpu_s()?, Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH)?);
        let output = command.output()?;
        let (wall_s, cpu_s) = (wall.elapsed().as_secs_f64(), children_cpu_s()? - cpu);
        let text = String::from_utf8(output.stdout)?;
        let numbers: Vec<f64> = text.lines().last().unwrap_or("").split(' ').filter_map(|n| n.parse().ok()).collect();
        let ([first, taken], true) = (&numbers[..], output.status.success()) else {
            let messages = std::fs::read_to_string(messages)?;
            return Err(format!("{} on {} failed: {messages}", side.loader, case.name).into());
        };
        Ok(Run { wall_s, cpu_s, first_batch_s: first - start.as_secs_f64(), samples: *taken })
    }

    /// Writes what ours is to make of a case's dataset.
    fn recipe(&self, case: &Case, side: &Side) -> Result<PathBuf, Failure> {
        // No run sees a picture twice, so that none of those kept decoded serves again, as others keep none.
        self.recipe_of(case.data, side.format, 1 << 30)
    }

    fn recipe_of(&self, data: &str, format: &str, memory_bytes: u64) -> Result<PathBuf, Failure> {
        let (first, second, steps) = match data {
            "jpeg" => (
                "image",
                "label",
                "{ decode = \"rgb\" }, { resize = [224, 224] }, { normalize = { mean = [0.485, 0.456, 0.406], std = [0.229, \
                 0.224, 0.225] } }",
            ),
            "raw" => ("image", "label", "{ elements = \"u8\" }"),
            _ => ("x", "y", ""),
        };
        let source = if format == "parquet" { "parquet/data.parquet" } else { format };
        let path = self.data.join(data).join(format!("{format}.toml"));
        std::fs::write(
            &path,
            format!(
                "path = \"{source}\"\nmemory_bytes = {memory_bytes}\n[[tensors]]\nname = \"{first}\"\ntransform = [{steps}]\n[[tensors]]\nname = \"{second}\"\n"
            ),
        )?;
        Ok(path)
    }
}

impl Measured {
    fn of(side: &Side, runs: &[[Run; 2]]) -> Measured {
        let over = |cost: fn(&Run) -> f64| {
            median(
                runs.iter().map(|[short, long]| (long.samples - short.samples) / (cost(long) - cost(short))).collect(),
            )
        };
        let loader = if side.loader == OURS { format!("{OURS} ({})", side.format) } else { side.loader.to_owned() };
        let per_cpu_s = over(|run| run.cpu_s);
        Measured {
            loader,
            per_cpu_s,
            per_wall_s: over(|run| run.wall_s),
            start_cpu_s: median(runs.iter().map(|[short, _]| short.cpu_s - short.samples / per_cpu_s).collect()),
            first_batch_s: median(runs.iter().flatten().map(|run| run.first_batch_s).collect()),
        }
    }
}

/// Reads all files of a folder into the page cache.
fn warm(folder: &Path) -> Result<(), Failure> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            warm(&path)?;
        } else {
            std::io::copy(&mut std::fs::File::open(&path)?, &mut std::io::sink())?;
        }
    }
    Ok(())
}

/// How many times a loader's rate the first of ours has, by CPU time and by wall time.
fn ratios(measured: &[Measured], of: &Measured) -> Option<(f64, f64)> {
    let ours = measured.iter().find(|m| m.loader.starts_with(OURS))?;
    Some((ours.per_cpu_s / of.per_cpu_s, ours.per_wall_s / of.per_wall_s))
}

fn target(case: &Case, loader: &str) -> Option<f64> {
    if loader.starts_with(OURS) {
        return None;
    }
    case.targets.iter().find(|(name, _)| name.is_empty() || *name == loader).map(|(_, target)| *target)
}

fn show(case: &Case, measured: &[Measured]) {
    println!("\n{} (batches of {})", case.name, case.batch);
    println!(
        "{:20} {:>14} {:>14} {:>12} {:>12} {:>8} {:>14} {:>14}",
        "loader", "samples/CPU s", "samples/s", "ours by CPU", "by wall", "target", "first batch s", "start CPU s"
    );
    for m in measured {
        let (by_cpu, by_wall) = ratios(measured, m).unwrap_or((f64::NAN, f64::NAN));
        let target = target(case, &m.loader).map_or_else(String::new, |t| format!("{t}"));
        println!(
            "{:20} {:>14.0} {:>14.0} {:>12.2} {:>12.2} {:>8} {:>14.2} {:>14.2}",
            m.loader, m.per_cpu_s, m.per_wall_s, by_cpu, by_wall, target, m.first_batch_s, m.start_cpu_s
        );
    }
}

fn facts(case: &Case, measured: &[Measured]) -> Value {
    let loaders: Vec<Value> = measured
        .iter()
        .map(|m| {
            let ratios = ratios(measured, m);
            json!({
                "loader": m.loader,
                "samples_per_cpu_s": m.per_cpu_s,
                "samples_per_wall_s": m.per_wall_s,
                "ours_times_by_cpu": ratios.map(|r| r.0),
                "ours_times_by_wall": ratios.map(|r| r.1),
                "target": target(case, &m.loader),
                "first_batch_s": m.first_batch_s,
                "start_cpu_s": m.start_cpu_s,
            })
        })
        .collect();
    json!({ "case": case.name, "batch": case.batch, "loaders": loaders })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// CPU time of all processes that this one started and that have ended, and of theirs.
fn children_cpu_s() -> Result<f64, Failure> {
    /// What Linux has shown to programs since 2.4, whatever the kernel counts in.
    const TICKS_PER_S: f64 = 100.0;
    let text = std::fs::read_to_string("/proc/self/stat")?;
    // The second field, a name in brackets, may hold spaces; `cutime` and `cstime` are fields 16 and 17.
    let fields = text.rsplit(')').next().unwrap_or("").split_whitespace();
    let ticks: f64 = fields.skip(13).take(2).filter_map(|n| n.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS_PER_S)
}
