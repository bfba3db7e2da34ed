//! What is done with controllers and memory.

pub mod disk;
pub mod latency;
pub mod ram;
pub mod worker;

pub use ram::Ram;
pub use worker::Worker;
