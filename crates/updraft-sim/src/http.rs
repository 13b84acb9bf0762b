//! HTTP/1.1 as far as clients of object stores speak it: one thread a connection, bodies with a length, no TLS.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use percent_encoding::percent_decode_str;

/// No test sends more in one request.
const BODY_BYTES_MAX: usize = 256 << 20;

/// What a client asks.
pub(crate) struct Request {
    pub(crate) method: String,
    /// Without the query, `%20` and its like read.
    pub(crate) path: String,
    pub(crate) query: BTreeMap<String, String>,
    /// By names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

/// What it gets.
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// The length to announce, where it is not the body's: for a HEAD, or to break off.
    pub(crate) announced_bytes: Option<usize>,
}

/// How the connection goes on.
pub(crate) enum Reply {
    Whole(Response),
    /// As much as there is, and then the connection ends.
    ThenClose(Response),
    /// The connection ends at once.
    Close,
    /// Nothing comes until the client gives up.
    Stall,
}

/// A server on a free port of the loopback interface, until it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
}

impl Server {
    pub(crate) fn start(handler: Arc<dyn Fn(Request) -> Reply + Send + Sync>) -> std::io::Result<Server> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = stopped.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let handler = handler.clone();
                // A connection that breaks is the client's to notice.
                std::thread::spawn(move || drop(serve(stream, handler.as_ref())));
            }
        });
        Ok(Server { address, stopped })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts; where that fails it is gone already.
        drop(TcpStream::connect(self.address));
    }
}

fn serve(stream: TcpStream, handler: &dyn Fn(Request) -> Reply) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    while let Some(request) = read_request(&mut reader)? {
        match handler(request) {
            Reply::Whole(response) => write_response(&mut writer, response)?,
            Reply::ThenClose(response) => return write_response(&mut writer, response),
            Reply::Close => return Ok(()),
            Reply::Stall => {
                // Returns when the client closes.
                reader.read_to_end(&mut Vec::new())?;
                return Ok(());
            }
        }
    }
    Ok(())
}

fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let malformed = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().ok_or_else(malformed)?.to_owned(), words.next().ok_or_else(malformed)?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (unescaped(&name.replace('+', " ")), unescaped(&value.replace('+', " "))))
        .collect();
    let path = unescaped(path);
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length: usize = headers.get("content-length").map_or(Ok(0), |v| v.parse()).map_err(|_| malformed())?;
    if length > BODY_BYTES_MAX {
        return Err(malformed());
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { method, path, query, headers, body }))
}

fn write_response(writer: &mut TcpStream, response: Response) -> std::io::Result<()> {
    let length = response.announced_bytes.unwrap_or(response.body.len());
    let mut head = format!("HTTP/1.1 {} -\r\nContent-Length: {length}\r\n", response.status);
    for (name, value) in &response.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(&response.body);
    writer.write_all(&bytes)
}

/// Text with `%20` and its like read.
fn unescaped(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}
