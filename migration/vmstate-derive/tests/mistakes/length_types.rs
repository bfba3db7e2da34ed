//! What only the types of collections and counts can tell.

use vmstate::{Slots, VmState};

#[derive(VmState)]
#[vmstate(name = "element")]
struct Element {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "narrow")]
struct CountThatIsTooNarrow {
    count: u8,
    #[vmstate(len = "count", max = 300)]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "rows")]
struct RowsWithoutEach {
    count: u8,
    #[vmstate(len = "count", max = 4)]
    tables: Vec<Slots<Element>>,
}

#[derive(VmState)]
#[vmstate(name = "constant")]
struct ConstantThatIsNoLength {
    #[vmstate(len = -1)]
    items: Slots<Element>,
}

fn main() {}
