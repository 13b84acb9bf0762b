//! A connection to one broker: encrypted and logged in where that is asked for, requests and answers in turn.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use rustls_platform_verifier::BuilderVerifierExt;

use super::cluster::{TIMEOUT_MS, Trouble, check};
use super::wire::{Reader, Writer, Wrong};

/// The largest answer that is taken. What is asked for is a few megabytes, and one batch where that is larger.
const ANSWER_BYTES_MAX: usize = 256 << 20;

const SASL_HANDSHAKE: i16 = 17;
const API_VERSIONS: i16 = 18;
const SASL_AUTHENTICATE: i16 = 36;

/// How connections are made.
pub(super) struct Security {
    pub tls: Option<Arc<ClientConfig>>,
    pub login: Option<Login>,
}

/// Who is logged in, by the mechanism `PLAIN`.
pub(super) struct Login {
    pub user: String,
    pub password: String,
}

/// TLS that trusts whom this machine trusts.
pub(super) fn tls() -> Result<Arc<ClientConfig>, String> {
    let builder = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into());
    let builder = builder.with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
    let builder = builder.with_platform_verifier().map_err(|e| e.to_string())?;
    Ok(Arc::new(builder.with_no_client_auth()))
}

trait Channel: Read + Write + Send {}

impl<T: Read + Write + Send> Channel for T {}

pub(super) struct Connection {
    address: String,
    channel: Box<dyn Channel>,
    /// What versions of requests the broker takes.
    versions: BTreeMap<i16, (i16, i16)>,
    /// The number of the last request.
    sent: i32,
}

impl Connection {
    pub(super) fn open(address: &str, security: &Security) -> Result<Connection, Trouble> {
        let away = |e: io::Error| Trouble::Away(format!("{address}: {e}"));
        let timeout = Some(Duration::from_millis(TIMEOUT_MS));
        let mut last = None;
        let mut stream = None;
        for socket in address.to_socket_addrs().map_err(away)? {
            match TcpStream::connect_timeout(&socket, Duration::from_millis(TIMEOUT_MS)) {
                Ok(connected) => {
                    stream = Some(connected);
                    break;
                }
                Err(error) => last = Some(error),
            }
        }
        let stream = stream.ok_or_else(|| away(last.unwrap_or_else(|| io::ErrorKind::NotFound.into())))?;
        stream.set_read_timeout(timeout).map_err(away)?;
        stream.set_write_timeout(timeout).map_err(away)?;
        stream.set_nodelay(true).map_err(away)?;
        let channel: Box<dyn Channel> = match &security.tls {
            None => Box::new(stream),
            Some(config) => {
                let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
                let host = host.trim_start_matches('[').trim_end_matches(']');
                let refused = |reason: String| Trouble::Refused(format!("TLS to {address}: {reason}"));
                let name = ServerName::try_from(host.to_owned()).map_err(|e| refused(e.to_string()))?;
                let client = ClientConnection::new(config.clone(), name).map_err(|e| refused(e.to_string()))?;
                Box::new(StreamOwned::new(client, stream))
            }
        };
        let mut connection = Connection { address: address.to_owned(), channel, versions: BTreeMap::new(), sent: 0 };
        let mut answer = connection.call(API_VERSIONS, 0, &[])?;
        check(answer.i16()?)?;
        let versions = answer.items(|api| Ok((api.i16()?, (api.i16()?, api.i16()?))))?;
        connection.versions = versions.into_iter().collect();
        if let Some(login) = &security.login {
            connection.log_in(login)?;
        }
        Ok(connection)
    }

    fn log_in(&mut self, login: &Login) -> Result<(), Trouble> {
        let mut request = Writer::default();
        request.text("PLAIN");
        let mut answer = self.call(SASL_HANDSHAKE, 1, &request.0)?;
        let code = answer.i16()?;
        let known = answer.items(Reader::text)?;
        if code != 0 {
            let known: Vec<String> = known.into_iter().flatten().collect();
            return Err(Trouble::Refused(format!(
                "{} takes logins by {}, and `PLAIN` is what can be given",
                self.address,
                known.join(", ")
            )));
        }
        let mut request = Writer::default();
        request.bytes(format!("\0{}\0{}", login.user, login.password).as_bytes());
        let mut answer = self.call(SASL_AUTHENTICATE, 0, &request.0)?;
        let (code, reason) = (answer.i16()?, answer.text()?);
        match code {
            0 => Ok(()),
            _ => Err(Trouble::Refused(format!(
                "{} refuses the login of `{}`: {}",
                self.address,
                login.user,
                reason.unwrap_or_else(|| format!("error {code}"))
            ))),
        }
    }

    /// The newest version of a request, of those from `low` to `high`, that the broker takes.
    pub(super) fn version(&self, api: i16, low: i16, high: i16) -> Result<i16, Trouble> {
        let (from, to) = self.versions.get(&api).copied().unwrap_or((0, -1));
        let version = high.min(to);
        if version < low.max(from) {
            let reason =
                format!("{} takes versions {from} to {to} of request {api}; {low} to {high} are known", self.address);
            return Err(Trouble::Refused(reason));
        }
        Ok(version)
    }

    /// Asks, and waits for the answer.
    pub(super) fn call(&mut self, api: i16, version: i16, body: &[u8]) -> Result<Reader, Trouble> {
        self.send(api, version, body)?;
        self.receive()
    }

    pub(super) fn send(&mut self, api: i16, version: i16, body: &[u8]) -> Result<(), Trouble> {
        self.sent = self.sent.wrapping_add(1);
        let mut request = Writer::default();
        request.i32(0).i16(api).i16(version).i32(self.sent).text("updraft");
        request.0.extend_from_slice(body);
        let length = (request.0.len() - 4) as i32;
        request.0[..4].copy_from_slice(&length.to_be_bytes());
        let sent = self.channel.write_all(&request.0).and_then(|()| self.channel.flush());
        sent.map_err(|e| self.trouble(e))
    }

    /// The answer to the request before.
    pub(super) fn receive(&mut self) -> Result<Reader, Trouble> {
        let mut length = [0; 4];
        self.channel.read_exact(&mut length).map_err(|e| self.trouble(e))?;
        let length = i32::from_be_bytes(length);
        let fits = usize::try_from(length).ok().filter(|length| *length <= ANSWER_BYTES_MAX);
        // A message by which TLS says that it was not spoken to.
        if length >> 16 == 0x1503 {
            return Err(Trouble::Refused(format!("{} speaks TLS: write kafka+ssl://", self.address)));
        }
        let Some(length) = fits else {
            let reason = format!("{}: an answer of {length} bytes, and {ANSWER_BYTES_MAX} are taken", self.address);
            return Err(Trouble::Refused(reason));
        };
        let mut answer = Vec::new();
        // Memory is taken as bytes come, not as they are promised.
        let taken = (&mut self.channel).take(length as u64).read_to_end(&mut answer).map_err(|e| self.trouble(e))?;
        if taken < length {
            return Err(self.trouble(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut answer = Reader(answer.into());
        let number = answer.i32()?;
        if number != self.sent {
            return Err(Wrong::from(format!("answers request {number}, and {} was asked", self.sent)).into());
        }
        Ok(answer)
    }

    fn trouble(&self, error: io::Error) -> Trouble {
        let address = &self.address;
        match error.kind() {
            // What TLS says of certificates and of servers that do not speak it.
            io::ErrorKind::InvalidData => Trouble::Refused(format!("TLS to {address}: {error}")),
            io::ErrorKind::UnexpectedEof => Trouble::Away(format!("{address} closed the connection")),
            io::ErrorKind::WouldBlock => {
                Trouble::Away(format!("{address} gave no answer for {} seconds", TIMEOUT_MS / 1000))
            }
            _ => Trouble::Away(format!("{address}: {error}")),
        }
    }
}
