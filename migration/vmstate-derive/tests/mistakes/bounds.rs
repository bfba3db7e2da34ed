//! Bounds that no value keeps, and bounds of what has none.

use vmstate::{Slots, VmState};

const SMALLEST: u16 = 16;
const LARGEST: u16 = 8;

#[derive(VmState)]
#[vmstate(name = "element")]
struct Element {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "literals")]
struct NoNumberIsBetween {
    #[vmstate(min = 5, max = 3)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "signed")]
struct NoNumberIsBetweenSigned {
    #[vmstate(max = -3, min = -2)]
    value: i16,
}

#[derive(VmState)]
#[vmstate(name = "constants")]
struct NoNumberIsBetweenConstants {
    #[vmstate(min = SMALLEST, max = LARGEST)]
    value: u16,
}

#[derive(VmState)]
#[vmstate(name = "count")]
struct CountThatMayNotBeSoLarge {
    #[vmstate(max = 4)]
    count: u8,
    #[vmstate(len = "count", max = 8)]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "count")]
struct CountThatMayNotBeSoSmall {
    #[vmstate(min = 5)]
    count: u8,
    #[vmstate(len = "count", max = 4)]
    items: Slots<Element>,
}

fn main() {}
