//! Commands, by kind.

pub(crate) mod admin;
pub(crate) mod features;
mod firmware;
pub(crate) mod format;
mod identify;
mod io;
mod logs;
pub(crate) mod queues;
pub(crate) mod sanitize;
