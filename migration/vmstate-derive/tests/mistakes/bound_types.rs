//! What only the types can tell of bounds and defaults.

use vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "element")]
struct Element {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "bounded", version = 2, oldest = 1)]
struct BoundedArray {
    #[vmstate(max = [4; 4])]
    values: [u8; 4],
}

#[derive(VmState)]
#[vmstate(name = "bounded")]
struct BoundedBool {
    #[vmstate(min = true)]
    value: bool,
}

#[derive(VmState)]
#[vmstate(name = "negative")]
struct NegativeMinimum {
    #[vmstate(min = -1)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "default", version = 2, oldest = 1)]
struct NoDefault {
    #[vmstate(since = 2)]
    value: Element,
}

#[derive(VmState)]
#[vmstate(name = "default", version = 2, oldest = 1)]
struct DefaultOfAnotherType {
    #[vmstate(since = 2, default = "\"seven\"")]
    value: u8,
}

fn main() {}
