//! A real Redis on this machine, for the time of a test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use updraft_base::{Clock, SystemClock};

/// A `redis-server` that keeps its data in a folder; killed when dropped.
pub struct RedisServer {
    child: Child,
    port: u16,
}

impl RedisServer {
    /// A port that nobody listens at.
    ///
    /// # Panics
    /// If this machine has none.
    pub fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port()
    }

    /// Starts a server that writes every change to its folder, and waits until it answers.
    ///
    /// # Panics
    /// If it does not start, and so where it is not installed: a test that did nothing would be taken for one that passed.
    pub fn start(folder: &Path, port: u16) -> RedisServer {
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            .args(["--appendfsync", "no", "--dir"])
            .arg(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server starts; where it is missing: apt-get install redis-server");
        let server = RedisServer { child, port };
        let clock = SystemClock::new();
        for _ in 0..500 {
            if let Ok(mut connection) = server.connect()
                && connection.try_call(&["PING"]).is_ok_and(|answer| answer == "PONG")
            {
                return server;
            }
            clock.sleep_ms(20);
        }
        panic!("redis-server does not answer at port {port}");
    }

    /// `redis://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The answer to a command, as text.
    ///
    /// # Panics
    /// If the server is gone or refuses.
    pub fn call(&self, command: &[&str]) -> String {
        self.connect().and_then(|mut c| c.try_call(command)).unwrap_or_else(|e| panic!("{command:?}: {e}"))
    }

    /// A connection for many commands.
    pub fn connect(&self) -> std::io::Result<RedisConnection> {
        Ok(RedisConnection { stream: BufReader::new(TcpStream::connect(("127.0.0.1", self.port))?) })
    }

    /// Kills it, as a power cut would.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // A process that is gone already is as good.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.end();
    }
}

/// A connection that sends commands as they are.
pub struct RedisConnection {
    stream: BufReader<TcpStream>,
}

impl RedisConnection {
    /// The answers to commands that are sent together, as text; those of lists are joined by spaces.
    pub fn call_all<S: AsRef<[u8]>>(&mut self, commands: &[Vec<S>]) -> std::io::Result<Vec<String>> {
        let mut request = Vec::new();
        for command in commands {
            write!(request, "*{}\r\n", command.len())?;
            for argument in command {
                write!(request, "${}\r\n", argument.as_ref().len())?;
                request.extend_from_slice(argument.as_ref());
                request.extend_from_slice(b"\r\n");
            }
        }
        self.stream.get_mut().write_all(&request)?;
        commands.iter().map(|_| self.answer()).collect()
    }

    fn try_call(&mut self, command: &[&str]) -> std::io::Result<String> {
        Ok(self.call_all(&[command.to_vec()])?.pop().unwrap_or_default())
    }

    fn answer(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let count: i64 = rest.parse().unwrap_or(-1);
        match kind {
            "-" => Err(std::io::Error::other(rest.to_owned())),
            "$" if count >= 0 => {
                let mut bytes = vec![0; count as usize + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(count as usize);
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            "*" => Ok((0..count).map(|_| self.answer()).collect::<Result<Vec<_>, _>>()?.join(" ")),
            "$" => Ok(String::new()),
            _ => Ok(rest.to_owned()),
        }
    }
}
