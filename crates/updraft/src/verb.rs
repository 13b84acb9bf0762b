//! One file for each verb.

pub mod inspect;
pub mod lineage;
pub mod new;
