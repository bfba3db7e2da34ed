//! Attributes on fields, alone and against each other.

use vmstate::{Slots, VmState};

#[derive(VmState)]
#[vmstate(name = "element")]
struct Element {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "unknown")]
struct UnknownOption {
    #[vmstate(length = "count")]
    items: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "no-max")]
struct CountWithoutMax {
    count: u8,
    #[vmstate(len = "count")]
    items: Slots<Element>,
}

#[derive(VmState)]
#[vmstate(name = "no-count")]
struct CountThatComesLater {
    #[vmstate(len = "count", max = 4)]
    items: Vec<u8>,
    count: u8,
}

#[derive(VmState)]
#[vmstate(name = "wide-count")]
struct CountThatIsNoLength {
    count: u64,
    #[vmstate(len = "count", max = 4)]
    items: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "new-count", version = 2, oldest = 1)]
struct CountThatMayBeAbsent {
    #[vmstate(since = 2)]
    count: u8,
    #[vmstate(len = "count", max = 4)]
    items: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "list")]
struct ListWithoutMax {
    #[vmstate(list)]
    items: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "list")]
struct ListOfNothing {
    #[vmstate(list, max = 4)]
    items: [u8; 4],
}

#[derive(VmState)]
#[vmstate(name = "both")]
struct ListAndCounted {
    count: u8,
    #[vmstate(list, len = "count", max = 4)]
    items: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "part")]
struct SubsectionThatIsAlwaysThere {
    #[vmstate(subsection)]
    part: Element,
}

#[derive(VmState)]
#[vmstate(name = "needed")]
struct NeededWithoutSubsection {
    #[vmstate(needed = "Self::needed")]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "future")]
struct SinceTheFuture {
    #[vmstate(since = 2)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "always", version = 3, oldest = 2)]
struct SinceAlways {
    #[vmstate(since = 2)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "now", version = 3, oldest = 2)]
struct UntilNow {
    #[vmstate(until = 3)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "never", version = 4, oldest = 1)]
struct Never {
    #[vmstate(since = 3, until = 2)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "default")]
struct DefaultThatIsNeverUsed {
    #[vmstate(default = "7")]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "default", version = 2, oldest = 1)]
struct DefaultThatIsNoExpression {
    #[vmstate(since = 2, default = "7 +")]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "versions", version = 3, oldest = 1)]
struct TooFewVersions {
    #[vmstate(versions = [1, 1])]
    value: Element,
}

fn main() {}
