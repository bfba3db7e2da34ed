//! Recursion that only the types can tell to be too much.

use vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "abyss", depth = 1000)]
struct Abyss {
    #[vmstate(list, max = 4, recursive)]
    inner: Vec<Abyss>,
}

fn main() {}
