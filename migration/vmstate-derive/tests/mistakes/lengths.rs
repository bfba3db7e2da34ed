//! Lengths of collections, and of collections of collections.

use vmstate::{Slots, VmState};

#[derive(VmState)]
#[vmstate(name = "element")]
struct Element {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "each")]
struct EachOfWhat {
    columns: u8,
    #[vmstate(each_len = "columns", each_max = 4)]
    tables: Vec<Slots<Element>>,
}

#[derive(VmState)]
#[vmstate(name = "each")]
struct EachWithoutMax {
    rows: u8,
    columns: u8,
    #[vmstate(len = "rows", max = 4, each_len = "columns")]
    tables: Vec<Slots<Element>>,
}

#[derive(VmState)]
#[vmstate(name = "each")]
struct EachOfAnArray {
    rows: u8,
    columns: u8,
    #[vmstate(len = "rows", max = 4, each_len = "columns", each_max = 4)]
    tables: [Slots<Element>; 4],
}

#[derive(VmState)]
#[vmstate(name = "each")]
struct MaximumOfNothing {
    rows: u8,
    #[vmstate(len = "rows", max = 4, each_max = 4)]
    tables: Vec<Element>,
}

#[derive(VmState)]
#[vmstate(name = "each", context = "usize")]
struct EachCountedTwice {
    rows: u8,
    #[vmstate(len = "rows", max = 4, each_len = "rows", each_len_from = "Clone::clone", each_max = 4)]
    tables: Vec<Slots<Element>>,
}

#[derive(VmState)]
#[vmstate(name = "constant")]
struct MaximumOfAConstant {
    #[vmstate(len = 4, max = 8)]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "shared", version = 2, oldest = 1)]
struct LengthSharedAcrossVersions {
    count: u8,
    #[vmstate(len = "count", max = 4)]
    items: Slots<Element>,
    #[vmstate(len = "count", max = 4, since = 2)]
    more: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "collection")]
struct LengthThatIsACollection {
    #[vmstate(list, max = 4)]
    count: Vec<u8>,
    #[vmstate(len = "count", max = 4)]
    items: Vec<u8>,
}

fn main() {}
