//! The states that the tests share.

use crate::{Bitmap, Slots, VmState};

mod arrays;
mod context;
mod description;
mod fields;
mod properties;
mod recursion;
mod schema;
mod sparse;
mod versions;

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "number")]
struct Number {
    value: i32,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "sparse")]
struct Sparse {
    count: u16,
    #[vmstate(len = "count", max = 8)]
    items: Slots<Number>,
}

fn sparse(values: &[Option<i32>]) -> Sparse {
    let items = values.iter().map(|value| value.map(|value| Number { value })).collect();
    Sparse { count: values.len() as u16, items }
}

/// One of everything.
#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "all", version = 3, oldest = 1, check = "All::consistent")]
struct All {
    flag: bool,
    byte: u8,
    signed: i64,
    raw: [u8; 5],
    words: [[u16; 2]; 3],
    inner: Number,
    pair: [Number; 2],
    #[vmstate(min = 1, max = 100)]
    level: u32,
    bytes_len: u32,
    #[vmstate(len = "bytes_len", max = 64)]
    bytes: Vec<u8>,
    count: u8,
    #[vmstate(len = "count", max = 4)]
    numbers: Vec<Sparse>,
    #[vmstate(len = "count", max = 4)]
    names: Vec<u64>,
    #[vmstate(list, max = 3)]
    queue: Vec<Number>,
    bits: u16,
    #[vmstate(len = "bits", max = 200)]
    map: Bitmap,
    #[vmstate(until = 1, default = "9")]
    old: u8,
    #[vmstate(since = 2)]
    new: u16,
    #[vmstate(since = 2, until = 2)]
    between: u8,
    #[vmstate(check = "even")]
    even: u8,
    #[vmstate(subsection)]
    part: Option<Part>,
    #[vmstate(subsection, needed = "All::other_needed")]
    other: Option<Other>,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "all/part", version = 2, oldest = 1)]
struct Part {
    value: u8,
    #[vmstate(since = 2)]
    more: u8,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "all/other")]
struct Other {
    value: u16,
}

impl All {
    fn consistent(&self) -> Result<(), String> {
        if self.flag && self.byte == 0xff { Err("flag is set with byte 0xff".into()) } else { Ok(()) }
    }

    fn other_needed(&self) -> bool {
        self.byte != 0
    }
}

fn even(value: &u8) -> Result<(), String> {
    if value.is_multiple_of(2) { Ok(()) } else { Err(format!("{value} is odd")) }
}

fn all() -> All {
    let mut map = Bitmap::new(70);
    map.set(0, true);
    map.set(69, true);
    All {
        flag: true,
        byte: 7,
        signed: -2,
        raw: *b"hello",
        words: [[1, 2], [3, 4], [5, 6]],
        inner: Number { value: 1 },
        pair: [Number { value: 2 }, Number { value: 3 }],
        level: 100,
        bytes_len: 3,
        bytes: vec![1, 2, 3],
        count: 2,
        numbers: vec![sparse(&[None]), sparse(&[Some(1)])],
        names: vec![0x0102_0304_0506_0708, 2],
        queue: vec![Number { value: 4 }, Number { value: 5 }],
        bits: 70,
        map,
        old: 9,
        new: 0x1234,
        between: 0,
        even: 4,
        part: Some(Part { value: 1, more: 2 }),
        other: Some(Other { value: 3 }),
    }
}
