//! Commands, by kind.

mod access;
pub(crate) mod admin;
pub(crate) mod copy;
pub(crate) mod features;
mod firmware;
pub(crate) mod format;
pub(crate) mod fused;
mod identify;
pub(crate) mod io;
pub(crate) mod limits;
mod lists;
mod logs;
mod namespaces;
pub(crate) mod queues;
pub(crate) mod reservation_features;
pub(crate) mod reservations;
pub(crate) mod sanitize;
pub(crate) mod self_test;
