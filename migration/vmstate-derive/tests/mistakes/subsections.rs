//! Subsections that a stream could not tell apart.

use vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "twins/part")]
struct Part {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "twins/part")]
struct Namesake {
    value: u16,
}

#[derive(VmState)]
#[vmstate(name = "twins")]
struct OneTypeTwice {
    #[vmstate(subsection)]
    first: Option<Part>,
    #[vmstate(subsection)]
    second: Option<Part>,
}

#[derive(VmState)]
#[vmstate(name = "twins")]
struct OneNameTwice {
    #[vmstate(subsection)]
    first: Option<Part>,
    value: u8,
    #[vmstate(subsection)]
    second: Option<Namesake>,
}

fn main() {}
