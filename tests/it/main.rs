//! Integration tests: the real binary, real processes, real guests. They need /dev/kvm, except `architecture`.

mod architecture;
