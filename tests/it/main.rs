//! Integration tests: the real binary, real processes, real guests. They need /dev/kvm, except `architecture`.

mod alone;
mod architecture;
mod blackout;
mod demo;
mod guest;
mod handover;
mod kills;
mod linux;
mod load;
mod migrate;
mod mistakes;
mod qmp;
mod refused;
mod signals;
mod suspend;
