//! For tests only: object stores that fail as real ones do, by a seeded schedule.
//!
//! A [`Schedule`] says which fault the n-th request of a kind for an object meets. That is a pure function of the seed, the
//! kind, the object and n, so a failing test fails again with the same seed, however its threads interleave.
//! [`FaultyStore`] plays the schedule in process, around any object store; [`ObjectServer`] plays it over HTTP, in the
//! dialects of S3 and of Google Cloud Storage's XML interface. [`RedisServer`] is no imitation: it starts the real one,
//! which tests kill.

mod faulty_store;
mod http;
mod kafka_server;
mod object_server;
mod redis_server;
mod schedule;

pub use faulty_store::FaultyStore;
pub use kafka_server::{KafkaRecord, KafkaServer};
pub use object_server::{Dialect, ObjectServer};
pub use redis_server::{RedisConnection, RedisServer};
pub use schedule::{Fault, FaultRates, Operation, Schedule};
