//! Commands, by kind.

pub(crate) mod admin;
pub(crate) mod features;
mod firmware;
mod identify;
mod io;
mod logs;
pub(crate) mod queues;
