//! What only the types of the fields can tell.

use vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "text")]
struct Text {
    value: String,
}

#[derive(VmState)]
#[vmstate(name = "bare")]
struct BareVec {
    value: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "counted")]
struct CountedArray {
    count: u8,
    #[vmstate(len = "count", max = 4)]
    value: [u8; 4],
}

fn main() {}
