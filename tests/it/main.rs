//! Integration tests: the real binary, real processes, real guests. They need /dev/kvm, except `architecture` and those of
//! `golden` and `inspect` that read files only.

mod alone;
mod architecture;
mod blackout;
mod channels;
mod chaos;
mod controller_memory;
mod convergence;
mod costs;
mod demo;
mod golden;
mod guest;
mod handover;
mod inspect;
mod kills;
mod large;
mod linux;
mod load;
mod local;
mod migrate;
mod mistakes;
mod multipath;
mod pages;
mod ping_pong;
mod postcopy;
mod processor;
mod protected;
mod qmp;
mod refused;
mod secure;
mod signals;
mod snapshots;
mod storage;
mod suspend;
mod tools;
