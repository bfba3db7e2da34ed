//! Structs inside structs that cannot work.

use vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "grown", version = 2, oldest = 1)]
struct Grown {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "parent", version = 2, oldest = 1)]
struct WhichVersion {
    part: Grown,
}

#[derive(VmState)]
#[vmstate(name = "parent", version = 2, oldest = 1)]
struct VersionThatIsNotRead {
    #[vmstate(versions = [1, 3])]
    part: Grown,
}

#[derive(VmState)]
#[vmstate(name = "stranger/part")]
struct Part {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "family")]
struct Family {
    #[vmstate(subsection)]
    part: Option<Part>,
}

fn main() {}
