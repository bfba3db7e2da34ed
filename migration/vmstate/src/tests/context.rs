use serde_json::json;

use super::Number;
use crate::{Slots, VmState, from_bytes, from_bytes_with, measure_with, schema_json, to_bytes};

/// What one side was configured with.
pub(super) struct Local {
    pub(super) page_bytes: u32,
    pub(super) slots: usize,
}

impl Local {
    fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    fn slots(&self) -> usize {
        self.slots
    }
}

#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "configured", context = "Local")]
pub(super) struct Configured {
    #[vmstate(equal = "Local::page_bytes")]
    pub(super) page_bytes: u32,
    #[vmstate(len_from = "Local::slots", max = 4)]
    pub(super) slots: Slots<Number>,
}

/// Knows nothing of the context that the struct inside wants.
#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "outer")]
struct Outer {
    #[vmstate(list, max = 2)]
    parts: Vec<Configured>,
}

fn outer() -> Outer {
    let slots = [None, Some(Number { value: 1 })].into_iter().collect();
    Outer { parts: vec![Configured { page_bytes: 4096, slots }] }
}

#[test]
fn count_of_the_context_is_not_in_the_stream() {
    let bytes = to_bytes(&outer());
    assert_eq!(bytes, [1, 0, 0, 0x10, 0, b'0', b'1', 0, 0, 0, 1, 0]);
    let local = Local { page_bytes: 4096, slots: 2 };
    assert_eq!(from_bytes_with::<Outer, _>(&bytes, 1, &local), Ok(outer()));
    let followed = [&bytes[..], &[0x7e]].concat();
    assert_eq!(measure_with::<Outer, _>(&followed, 1, &local), Ok(bytes.len()));
    let fewer = Local { slots: 1, ..local };
    assert!(from_bytes_with::<Outer, _>(&bytes, 1, &fewer).is_err());
    let more = Local { slots: 5, ..local };
    let error = from_bytes_with::<Outer, _>(&bytes, 1, &more).unwrap_err();
    assert_eq!(error.to_string(), "parts[0].slots: 5 is above 4");
}

#[test]
fn value_of_the_other_side_must_be_ours() {
    let local = Local { page_bytes: 8192, slots: 2 };
    let error = from_bytes_with::<Outer, _>(&to_bytes(&outer()), 1, &local).unwrap_err();
    assert_eq!(error.to_string(), "parts[0].page_bytes: 4096 differs from this side's 8192");
}

/// A configuration too long to be printed whole.
#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "long", context = "[u8; 4096]")]
struct Long {
    #[vmstate(equal = "Clone::clone")]
    bytes: [u8; 4096],
}

#[test]
fn message_shows_the_beginning_of_long_values() {
    let error = from_bytes_with::<Long, _>(&[1; 4096], 1, &[2_u8; 4096]).unwrap_err().to_string();
    assert!(
        error.starts_with("bytes: [1, 1, 1, ") && error.contains("... differs from this side's [2, 2, 2"),
        "{error}"
    );
    assert!(error.len() < 300);
}

#[test]
fn missing_context_is_an_error_that_says_which() {
    let bytes = to_bytes(&outer());
    let wanted = "parts[0]: loading this needs a context vmstate::tests::context::Local";
    let error = from_bytes::<Outer>(&bytes, 1).unwrap_err();
    assert_eq!(error.to_string(), format!("{wanted}, and there is none"));
    let error = measure_with::<Outer, _>(&bytes, 1, &7_u8).unwrap_err();
    assert_eq!(error.to_string(), format!("{wanted}, and there is a u8"));
}

#[test]
fn schema_says_what_the_context_decides() {
    let fields = &schema_json::<Configured>()["fields"];
    assert_eq!(fields[0]["equal"], json!(true));
    assert_eq!(fields[1]["count_from_context"], json!(true));
}
