//! Bounds that the field cannot reach.

use vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "wide")]
struct MaximumThatIsTooWide {
    #[vmstate(max = 300)]
    value: u8,
}

fn main() {}
