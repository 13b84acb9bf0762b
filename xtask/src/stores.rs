//! Runs the tests of stores against other people's servers: moto for S3, Azurite for Azure.
//!
//! Both are installed under `target/`, started on free ports of the loopback interface for the length of the tests, and
//! stopped. The tests get their addresses through the environment.

use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::Args;

use crate::{Failure, python};

/// Options of `stores`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Only tests whose names contain this.
    #[arg(default_value = "")]
    filter: String,
}

/// Releases that the tests were written against.
const MOTO: &[&str] = &["moto[server]==5.2.5"];
const AZURITE: &str = "azurite@3.35.0";

/// How long a server may take to answer; moto imports for seconds on a loaded machine.
const START_SECONDS_MAX: u32 = 60;

/// The bucket and the container of the tests.
const BUCKET: &str = "updraft";

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let interpreter = python::environment(root, "stores", MOTO)?;
    let azurite = azurite(root)?;

    let s3_port = free_port()?;
    let moto = interpreter.with_file_name("moto_server");
    let _moto = Server::start(Command::new(moto).args(["-H", "127.0.0.1", "-p", &s3_port.to_string()]), s3_port)?;
    let s3 = format!("http://127.0.0.1:{s3_port}");

    let azure_port = free_port()?;
    let _azurite = Server::start(
        Command::new("node").arg(azurite).args([
            "--skipApiVersionCheck",
            "--inMemoryPersistence",
            "--silent",
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            &azure_port.to_string(),
        ]),
        azure_port,
    )?;
    let azure = format!("http://127.0.0.1:{azure_port}/devstoreaccount1");
    // The crate `object_store` makes neither buckets nor containers.
    python::run(
        Command::new(&interpreter)
            .args(["-c", include_str!("stores.py")])
            .args([&s3, &azure].map(|server| format!("{server}/{BUCKET}"))),
    )?;

    println!("moto at {s3}, Azurite at {azure}");
    python::run(
        Command::new(env!("CARGO"))
            .current_dir(root)
            .args(["test", "--package", "updraft-store", "--test", "stores", "--test", "faulty_network", "--"])
            .args(["--nocapture", &arguments.filter])
            .env("UPDRAFT_TEST_S3", &s3)
            .env("UPDRAFT_TEST_AZURE", &azure),
    )
}

/// The script that starts Azurite, installed where it is not yet.
fn azurite(root: &Path) -> Result<PathBuf, Failure> {
    let folder = root.join("target/node/azurite");
    let script = folder.join("node_modules/azurite/dist/src/blob/main.js");
    let stamp = folder.join("release.txt");
    if script.exists() && std::fs::read_to_string(&stamp).is_ok_and(|have| have == AZURITE) {
        return Ok(script);
    }
    std::fs::create_dir_all(&folder)?;
    eprintln!("installing {AZURITE} into {}", folder.display());
    python::run(
        Command::new("npm")
            .args(["install", "--silent", "--no-audit", "--no-fund", "--no-save", "--prefix"])
            .arg(&folder)
            .arg(AZURITE),
    )?;
    std::fs::write(stamp, AZURITE)?;
    Ok(script)
}

/// A server that is stopped when this goes.
pub(crate) struct Server(Child);

impl Server {
    pub(crate) fn start(command: &mut Command, port: u16) -> Result<Server, Failure> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{command:?}: {e}"))?;
        let mut server = Server(child);
        for _ in 0..START_SECONDS_MAX * 10 {
            if let Some(status) = server.0.try_wait()? {
                let mut said = String::new();
                server.0.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said)).transpose()?;
                return Err(format!("{command:?} ended with {status}: {said}").into());
            }
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                // A server whose messages nobody reads stops when the pipe is full.
                if let Some(stderr) = server.0.stderr.take() {
                    std::thread::spawn(move || BufReader::new(stderr).lines().for_each(drop));
                }
                return Ok(server);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(format!("{command:?} does not answer on port {port}").into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A server that is gone already is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
