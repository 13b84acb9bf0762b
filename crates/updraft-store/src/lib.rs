//! Bytes that last: artifacts on an object store.
