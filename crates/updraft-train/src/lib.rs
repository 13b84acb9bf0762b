//! The training loop: state, step, schedule, checkpoint, resume.
