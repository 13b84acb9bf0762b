//! Updraft's command line: the only place that reads arguments and the environment, prints, and picks exit codes.

fn main() {}
