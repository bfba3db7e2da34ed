//! Block backends: where the bytes of a namespace live.
#![deny(unsafe_code)]

mod backend;

pub use backend::{Backend, Buffers, Completion, Failure, Identity, Operation, Request};

/// (skeleton)
#[derive(Debug)]
pub struct IoContext;
/// (skeleton)
#[derive(Debug, thiserror::Error)]
pub enum Error {}
