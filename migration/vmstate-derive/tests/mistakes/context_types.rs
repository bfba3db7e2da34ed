//! What the functions that are asked must give.

use vmstate::{Slots, VmState};

struct Local;

impl Local {
    fn size(&self) -> u32 {
        4
    }
}

#[derive(VmState)]
#[vmstate(name = "element")]
struct Element {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "count", context = "Local")]
struct CountThatIsNoLength {
    #[vmstate(len_from = "Local::size", max = 4)]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "equal", context = "Local")]
struct EqualToAnotherType {
    #[vmstate(equal = "Local::size")]
    size: u64,
}

#[derive(VmState)]
#[vmstate(name = "equal", context = "u8")]
struct EqualInAnotherContext {
    #[vmstate(equal = "Local::size")]
    size: u32,
}

fn main() {}
