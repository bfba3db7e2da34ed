//! (skeleton)
pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod dirty;
pub mod drive;
pub mod io_thread;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod vcpu;
pub mod vmm;
