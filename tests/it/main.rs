//! Integration tests: the real binary, real processes, real guests. They need /dev/kvm, except `architecture`.

mod alone;
mod architecture;
mod demo;
mod guest;
mod migrate;
mod mistakes;
