//! Contexts, and what asks them.

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
#[vmstate(name = "nobody-to-ask")]
struct CountOfNoContext {
    #[vmstate(len_from = "Local::size", max = 4)]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "nobody-to-ask")]
struct EqualToNoContext {
    #[vmstate(equal = "Local::size")]
    size: u32,
}

#[derive(VmState)]
#[vmstate(name = "unasked", context = "Local")]
struct ContextThatNobodyAsks {
    size: u32,
}

#[derive(VmState)]
#[vmstate(name = "no-type", context = "3 + 4")]
struct ContextThatIsNoType {
    #[vmstate(equal = "Local::size")]
    size: u32,
}

#[derive(VmState)]
#[vmstate(name = "no-max", context = "Local")]
struct CountWithoutMax {
    #[vmstate(len_from = "Local::size")]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "both", context = "Local")]
struct CountedTwice {
    count: u8,
    #[vmstate(len = "count", len_from = "Local::size", max = 4)]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "equal/part", context = "Local")]
struct EqualSubsection {
    #[vmstate(subsection, equal = "Local::size")]
    part: Option<Element>,
}

fn main() {}
