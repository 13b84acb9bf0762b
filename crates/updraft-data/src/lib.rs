//! Batches: a deterministic, resumable slice of a dataset, as tensors.
