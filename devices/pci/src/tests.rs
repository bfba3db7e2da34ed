//! The crate against a driver-side view: what a guest would do, and what a hostile one could.
