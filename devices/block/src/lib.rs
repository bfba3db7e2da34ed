//! Block backends: where the bytes of a namespace live.
#![deny(unsafe_code)]

mod backend;
mod context;
mod error;
mod guest;
mod memory;
mod null;

pub use backend::{Backend, Buffers, Completion, Failure, Identity, Operation, Request};
pub use context::IoContext;
pub use error::Error;
pub use memory::MemoryImage;
pub use null::NullImage;
