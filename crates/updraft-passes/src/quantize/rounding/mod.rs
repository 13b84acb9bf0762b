//! Roundings of weights that look at what the layer computes, not at each weight alone.
