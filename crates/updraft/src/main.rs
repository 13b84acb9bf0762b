//! Updraft's command line: the only place that reads arguments and the environment, prints, and picks exit codes.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use updraft::cli::Cli;
use updraft::context::Context;
use updraft::progress::Progress;
use updraft::requests::Requests;
use updraft_base::clock::SystemClock;
use updraft_data::KnownDigests;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(asked) => {
            // Help and version arrive here too, with code 0. Nothing can be done about a closed terminal.
            let _ = asked.print();
            return ExitCode::from(u8::try_from(asked.exit_code()).unwrap_or(2));
        }
    };
    let clock = Arc::new(SystemClock::new());
    let stderr_line = |line: &str| {
        let _ = writeln!(std::io::stderr(), "{line}");
    };
    let progress = if std::io::stderr().is_terminal() && !cli.global.json {
        Progress::bars()
    } else {
        Progress::lines(&*clock, &stderr_line)
    };
    let threads = cli.global.threads.or_else(|| std::thread::available_parallelism().ok());
    let clock_of_caches = clock.clone();
    let context = cli.global.caches(clock_of_caches).map(|caches| Context {
        store_url: cli.global.store.clone(),
        store_settings: store_settings(),
        threads: threads.map_or(1, std::num::NonZeroUsize::get),
        seed: cli.global.seed,
        known_digests: cache_dir().map(|dir| Arc::new(KnownDigests::new(&dir.join("digests"), clock.clone()))),
        caches,
        requests: Requests::default(),
        clock: clock.clone(),
        progress: &progress,
    });
    let json = cli.global.json;
    let (text, code) = match context.and_then(|context| cli.verb.run(&context)) {
        Ok(answer) if json => (format!("{:#}\n", answer.json), 0),
        Ok(answer) => (answer.text, 0),
        Err(failure) => {
            stderr_line(&failure.to_string());
            let text = match &failure.answer {
                _ if json => format!("{:#}\n", failure.json()),
                Some(answer) => answer.text.clone(),
                None => String::new(),
            };
            (text, failure.kind.exit_code())
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::from(code),
        // The reader went away, as `head` does.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::from(code),
        Err(e) => {
            stderr_line(&format!("error: cannot write the answer: {e}"));
            ExitCode::FAILURE
        }
    }
}

/// Where a user's programs keep what they can make again; `None` where `UPDRAFT_CACHE_DIR` is empty, or no folder is known.
#[allow(clippy::disallowed_methods, reason = "the program's rim")]
fn cache_dir() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match std::env::var_os("UPDRAFT_CACHE_DIR") {
        Some(dir) => Some(PathBuf::from(dir)).filter(|dir| !dir.as_os_str().is_empty()),
        None => {
            variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache"))).map(|dir| dir.join("updraft"))
        }
    }
}

/// The variables that stores are configured by: those of the providers' own tools.
#[allow(clippy::disallowed_methods, reason = "the program's rim")]
fn store_settings() -> std::collections::BTreeMap<String, String> {
    const PREFIXES: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];
    std::env::vars_os()
        // A variable that is not UTF-8 is none of these.
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name == "HOME" || PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
        .collect()
}
