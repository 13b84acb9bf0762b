//! Our chores as one program: `cargo xtask CHORE`.

fn main() {}
