//! Makes a Graph run fast.
