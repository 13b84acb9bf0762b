//! Pruning: fewer weights, or fewer channels.
