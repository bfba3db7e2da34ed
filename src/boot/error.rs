//! Why a guest cannot be booted.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use crate::vcpu::BootProtocol;

/// Errors of [`super::load`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A folder, device or pipe was named.
    #[error("{what} {} is not a regular file", path.display())]
    NotAFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// What was named.
        path: PathBuf,
    },
    /// The kernel cannot be read.
    #[error("cannot read kernel {name}")]
    ReadKernel {
        /// The file.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The file is no kernel.
    #[error("{name} is neither an ELF vmlinux nor a bzImage")]
    UnknownFormat {
        /// The file.
        name: String,
    },
    /// The kernel's headers make no sense, or it lies outside of guest memory.
    #[error("cannot load kernel {name} into {memory_bytes} bytes of guest memory")]
    LoadKernel {
        /// The file.
        name: String,
        /// RAM in bytes.
        memory_bytes: u64,
        /// Why.
        source: linux_loader::loader::Error,
    },
    /// The kernel does not offer the way in that was asked for.
    #[error("kernel {name} cannot be entered by {protocol:?}: {reason}")]
    Protocol {
        /// The file.
        name: String,
        /// What was asked for.
        protocol: BootProtocol,
        /// What is missing.
        reason: &'static str,
    },
    /// The kernel would start or reach outside of guest memory.
    #[error("kernel {name} does not fit: its {what} {address:#x} is not in guest memory")]
    KernelOutside {
        /// The file.
        name: String,
        /// `entry point` or `last byte`.
        what: &'static str,
        /// Where.
        address: u64,
    },
    /// No room for the initrd.
    #[error(
        "initrd {} ({length_bytes} bytes) does not fit between the kernel's end {kernel_end:#x} and {limit:#x}",
        path.display()
    )]
    InitrdSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        length_bytes: u64,
        /// First byte behind the kernel.
        kernel_end: u64,
        /// First byte that the initrd must not reach.
        limit: u64,
    },
    /// The initrd cannot be read into memory.
    #[error("cannot read initrd {} into guest memory", path.display())]
    ReadInitrd {
        /// The file.
        path: PathBuf,
        /// Why.
        source: GuestMemoryError,
    },
    /// The kernel would cut the command line.
    #[error("the kernel command line has {length} bytes; this kernel takes {maximum}")]
    CommandLineLength {
        /// What was given.
        length: usize,
        /// What the kernel takes.
        maximum: usize,
    },
    /// The kernel would read a part only.
    #[error("the kernel command line contains a NUL character")]
    CommandLineNul,
    /// RAM does not begin with a whole megabyte.
    #[error("guest memory lacks the first MiB")]
    NoLowMemory,
    /// The tables do not fit.
    #[error("the {what} tables for {cpus} vCPUs take {length} bytes, more than {maximum}")]
    TablesSize {
        /// `ACPI` or `MP`.
        what: &'static str,
        /// vCPUs.
        cpus: u8,
        /// Bytes.
        length: usize,
        /// What is set aside for them.
        maximum: usize,
    },
    /// The host gives no random numbers.
    #[error("cannot draw the VM generation ID")]
    Random(#[source] std::io::Error),
    /// Guest memory refused a write.
    #[error("cannot write {what} to guest memory at {address:#x}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Where.
        address: u64,
        /// Why.
        source: GuestMemoryError,
    },
}
