//! Attributes that are not written as attributes are.

use vmstate::VmState;

#[derive(VmState)]
#[vmstate]
struct NothingSaid {
    value: u8,
}

#[derive(VmState)]
#[vmstate = "name"]
struct NotInParentheses {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "version", version = "2")]
struct VersionThatIsNoNumber {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "version", version = 4294967296)]
struct VersionThatIsTooLarge {
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "twice")]
struct BoundTwice {
    #[vmstate(max = 1, max = 2)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "twice")]
struct BoundTwiceInTwoAttributes {
    #[vmstate(max = 1)]
    #[vmstate(max = 2)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "value")]
struct ListWithAValue {
    #[vmstate(list = 4, max = 4)]
    value: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "value")]
struct BoundWithoutAValue {
    #[vmstate(max)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "path")]
struct CheckWithoutQuotes {
    #[vmstate(check = u8::is_power_of_two)]
    value: u8,
}

#[derive(VmState)]
#[vmstate(name = "lifetime")]
struct Borrowed<'a> {
    value: &'a u8,
}

#[derive(VmState)]
#[vmstate(name = "constant")]
struct Sized<const BYTES: usize> {
    value: [u8; BYTES],
}

#[derive(VmState)]
#[vmstate(name = "early", version = 3, oldest = 2)]
struct UntilBeforeTheOldest {
    #[vmstate(until = 1)]
    value: u8,
}

fn main() {}
