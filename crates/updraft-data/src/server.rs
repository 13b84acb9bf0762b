//! A Redis server: where it is, and connections that give up in time.

use std::time::Duration;

use redis::{Client, Connection, RedisError, RedisResult};

use crate::error::DataError;

/// A database of a server. Its name has no password, so that it can be in messages and manifests.
#[derive(Clone)]
pub(crate) struct Server {
    client: Client,
    name: String,
}

impl Server {
    /// The server of `redis://[user:password@]host[:port]/PATH[?db=N]`, and the path.
    pub(crate) fn parse(url: &str) -> Result<(Server, String), DataError> {
        let shown = url.split_once('@').map_or(url, |(_, after)| after);
        let wrong = |reason: &str| DataError::Stream { stream: shown.to_owned(), reason: reason.to_owned() };
        if url.starts_with("rediss://") {
            return Err(wrong("TLS to Redis is not supported; reach the server through a tunnel or a private network"));
        }
        let form = "is not of the form redis://[user:password@]host[:port]/NAME[?db=N]";
        let rest = url.strip_prefix("redis://").ok_or_else(|| wrong(form))?;
        let (rest, database) = match rest.split_once('?') {
            None => (rest, 0),
            Some((rest, query)) => {
                let database = query.strip_prefix("db=").and_then(|number| number.parse::<u16>().ok());
                (rest, database.ok_or_else(|| wrong(form))?)
            }
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        if host.is_empty() {
            return Err(wrong(form));
        }
        let client = Client::open(format!("redis://{authority}/{database}")).map_err(|e| wrong(&e.to_string()))?;
        let name = match database {
            0 => format!("redis://{host}"),
            _ => format!("redis://{host}?db={database}"),
        };
        Ok((Server { client, name }, path.to_owned()))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A connection that fails where the server takes longer than `timeout_ms` for anything.
    pub(crate) fn connect(&self, timeout_ms: u64) -> RedisResult<Connection> {
        let timeout = Duration::from_millis(timeout_ms.max(1));
        let connection = self.client.get_connection_with_timeout(timeout)?;
        connection.set_read_timeout(Some(timeout))?;
        connection.set_write_timeout(Some(timeout))?;
        Ok(connection)
    }

    /// An error for people, who see which server it is about.
    pub(crate) fn error(&self, error: &RedisError) -> DataError {
        let reason = error.to_string();
        match is_away(error) {
            true => DataError::Server { server: self.name.clone(), reason },
            false => DataError::Stream { stream: self.name.clone(), reason },
        }
    }
}

/// Whether the server may answer later.
pub(crate) fn is_away(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_connection_dropped()
        || matches!(error.code(), Some("LOADING" | "BUSY" | "MASTERDOWN" | "TRYAGAIN" | "EXECABORT"))
}

/// Whether the server answers, and takes nothing: it is full, or a copy of another.
pub(crate) fn takes_no_writes(error: &RedisError) -> bool {
    let errors = error.clone().into_server_errors().unwrap_or_default();
    let refuses = |code: &str| matches!(code, "OOM" | "READONLY" | "MISCONF" | "NOREPLICAS");
    !errors.is_empty() && errors.iter().all(|(_, error)| refuses(error.code()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_server_and_stream_without_the_password() {
        for (url, name, path) in [
            ("redis://localhost/clicks", "redis://localhost", "clicks"),
            ("redis://me:secret@host:6380/a/b:c", "redis://host:6380", "a/b:c"),
            ("redis://host/clicks?db=3", "redis://host?db=3", "clicks"),
            ("redis://host", "redis://host", ""),
        ] {
            let (server, found) = Server::parse(url).unwrap();
            assert_eq!((server.name(), found.as_str()), (name, path));
        }
        for url in ["rediss://me:secret@host/a", "redis://", "redis:///a", "http://me:secret@host/a", "redis://h/a?x=1"]
        {
            let message = Server::parse(url).map(|_| ()).unwrap_err().to_string();
            assert!(!message.contains("secret"), "{message}");
        }
    }
}
