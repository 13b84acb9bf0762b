//! Random networks: every rewrite keeps its promise on them, and their gradients are their slopes.

mod gradients;
mod grow;
mod quantized;
mod rewrites;
