//! Structs that contain themselves, and what they must say of it.

use vmstate::{Slots, VmState};

#[derive(VmState)]
#[vmstate(name = "unlimited")]
struct Unlimited {
    count: u8,
    #[vmstate(len = "count", max = 4, recursive)]
    inner: Slots<Unlimited>,
}

#[derive(VmState)]
#[vmstate(name = "flat", depth = 4)]
struct Flat {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "nowhere", depth = 0)]
struct Nowhere {
    #[vmstate(list, max = 4, recursive)]
    inner: Vec<Nowhere>,
}

#[derive(VmState)]
#[vmstate(name = "plain", depth = 4)]
struct Plain {
    #[vmstate(recursive)]
    inner: [Flat; 4],
}

#[derive(VmState)]
#[vmstate(name = "optional", depth = 4)]
struct Optional {
    #[vmstate(subsection, recursive)]
    inner: Option<Flat>,
}

fn main() {}
