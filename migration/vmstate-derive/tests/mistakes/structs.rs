//! Attributes on the struct, and things that are no plain struct.

use vmstate::VmState;

#[derive(VmState)]
struct Nameless {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "")]
struct EmptyName {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "versions", version = 1, oldest = 2)]
struct OldestAboveVersion {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "twice", name = "again")]
struct Twice {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "unknown", colour = 1)]
struct UnknownOption {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "tuple")]
struct Tuple(u8);

#[derive(VmState)]
#[vmstate(name = "choice")]
enum Choice {
    One,
}

#[derive(VmState)]
#[vmstate(name = "generic")]
struct Generic<T> {
    value: T,
}

fn main() {}
