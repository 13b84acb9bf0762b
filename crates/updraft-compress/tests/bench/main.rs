//! Searches and sensitivities on the real bench, with networks that are trained here.

mod language;
mod sensitivity;
mod workplace;
