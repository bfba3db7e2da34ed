//! Files that are not what was written: every cut, every flip, and descriptions that promise too much.

use serde_json::json;
use stream::Description;

use super::files::{controller, diff, file, foreign, input, json, tree};
use crate::inspect::{Input, Limited, Tree, write_json};

/// A stream of one section, described by `entries`.
fn described(entries: &serde_json::Value, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x04\0\0\0\x01\x01x\0\0\0\0\0\0\0\x01".to_vec();
    bytes.extend(payload);
    bytes.extend(b"\x7e\0\0\0\x01\0\x06");
    let trailer = json!({ "devices": [
        { "name": "x", "instance_id": 0, "vmsd_name": "x", "version": 1, "fields": entries }] });
    let trailer = trailer.to_string();
    bytes.extend((trailer.len() as u32).to_be_bytes());
    bytes.extend(trailer.bytes());
    bytes
}

#[test]
fn every_truncation_is_an_error_in_both_formats() {
    let whole = file(&controller(), 7);
    for length in 0..whole.len() {
        let (_, result) = tree(&whole[..length]);
        let error = format!("{:#}", result.expect_err("a file that is cut off"));
        if length > 8 {
            assert!(error.contains(&format!("byte {length}")), "of {length}: {error}");
        }
        if length % 97 == 0 {
            json(&whole[..length]).1.unwrap_err();
        }
    }
}

#[test]
fn every_flipped_byte_is_an_error_or_another_description() {
    let whole = file(&controller(), 7);
    let trailer = whole.iter().rposition(|byte| *byte == 0).unwrap();
    let (good, _) = tree(&whole);
    for at in 0..whole.len() {
        // Pages are alike in all their bytes.
        if (300..8300).contains(&at) && at % 61 != 0 {
            continue;
        }
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        let (printed, result) = tree(&damaged);
        match result {
            Err(error) => assert!(!format!("{error:#}").is_empty()),
            Ok(_) => assert!(at > trailer, "byte {at} changed, and nothing is printed but\n{printed}"),
        }
        // What comes before the damage is printed as it was, if the trailer is found.
        let start = &good[..good.find("section").unwrap()];
        assert!(at + 5 > trailer || at < 8400 || printed.starts_with(start), "byte {at}: {printed}");
    }
}

#[test]
fn flipped_bytes_of_a_foreign_stream_never_break_anything() {
    let whole = foreign();
    // A generator of Lehmer's, so that the same bytes are changed every time.
    let mut random = 1_u64;
    let mut next = |below: usize| {
        random = random * 48271 % 0x7fff_ffff;
        random as usize % below
    };
    let (mut refused, mut printed) = (0, 0);
    for _ in 0..300 {
        let mut damaged = whole.clone();
        for _ in 0..=next(3) {
            let at = next(damaged.len());
            damaged[at] ^= 1 << next(8);
        }
        let (document, result) = json(&damaged);
        match result {
            Ok(_) => printed += 1,
            Err(error) => {
                refused += 1;
                if let Some(document) = document {
                    assert_eq!(document["error"], format!("{error:#}"));
                }
            }
        }
    }
    assert!(refused > 50 && printed > 50, "{refused} refused, {printed} printed");
}

#[test]
fn damage_is_told_after_the_whole_tree() {
    let mut bytes = file(&controller(), 7);
    let (whole, _) = tree(&bytes);
    let page = bytes.windows(64).position(|window| window == [7; 64]).unwrap();
    bytes[page + 5000] ^= 1;
    let (printed, result) = tree(&bytes);
    assert_eq!(printed, whole);
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.starts_with("MiB 0 of RAM block \"low\" is damaged: its digest is 0x"), "{error}");
}

#[test]
fn sections_that_are_not_as_described_name_path_and_byte() {
    let entries = json!([{ "name": "outer", "type": "struct", "size": 2, "struct": {
        "vmsd_name": "y", "version": 1, "fields": [{ "name": "b", "type": "bool", "size": 1 },
                                                    { "name": "c", "type": "bool", "size": 1 }] } }]);
    assert!(tree(&described(&entries, &[0, 1])).1.is_ok());
    let (printed, result) = tree(&described(&entries, &[0, 2]));
    assert_eq!(format!("{:#}", result.unwrap_err()), "section \"x\": outer: at byte 24: 0x02 is not a bool");
    assert!(printed.ends_with("  outer  y\n"), "{printed}");
    let (document, _) = json(&described(&entries, &[0, 2]));
    let document = document.unwrap();
    assert_eq!(document["sections"], json!([]));
    assert_eq!(document["error"], "section \"x\": outer: at byte 24: 0x02 is not a bool");
    let error = format!("{:#}", tree(&described(&entries, &[0, 1, 1])).1.unwrap_err());
    assert!(error.contains("at byte 25, not by its footer"), "{error}");
}

#[test]
fn small_files_cannot_print_without_end() {
    let zero = json!({ "name": "z", "type": "struct", "size": 0, "struct": { "fields": [] } });
    let zeros = vec![zero; 2000];
    let entries = json!([{ "name": "e", "type": "struct", "size": 1, "array_len": 30000, "struct": {
        "fields": zeros.iter().cloned().chain([json!({ "name": "n", "type": "uint8", "size": 1 })]).collect::<Vec<_>>() } }]);
    let payload: Vec<u8> = (0..30000_u32).map(|index| index as u8).collect();
    let bytes = described(&entries, &payload);
    assert!(bytes.len() < 250_000);
    let mut out = Vec::new();
    let (_, result) = input(&bytes).unwrap().walk(&mut Tree::new(Limited::new(&mut out, 1 << 20)));
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.contains("more to print than a file should have"), "{error}");
    assert!(out.len() <= 1 << 20);
    let mut out = Vec::new();
    assert!(write_json(&input(&bytes).unwrap(), Limited::new(&mut out, 1 << 20), |_| true, true).is_err());
    assert!(out.len() <= 1 << 20);
    let result = diff(&bytes, &described(&entries, &vec![1; 30000]));
    let error = format!("{:#}", result.map(|lines| lines.len()).unwrap_err());
    assert!(error.starts_with("x: ") && error.ends_with("that is too much to compare"), "{error}");
}

#[test]
fn what_is_no_stream_is_said_so() {
    let refused = |bytes: &[u8]| format!("{:#}", input(bytes).unwrap_err());
    assert!(refused(b"").contains("it starts with []"), "{}", refused(b""));
    assert!(refused(b"hello").contains("not with \"QEVM\""));
    assert!(refused(b"\x1f\x8b\x08").contains("gunzip"));
    assert!(refused(b"\x04\0\0\0\x01").contains("--description"));
    assert!(refused(b"QEVM\0\0\0\x03\0").contains("ends at byte 9 without a trailer"));
    let list = Description::parse(b"[1]").unwrap();
    let error = Input::new(b"QEVM\0\0\0\x03\0".as_slice(), Some(list))
        .unwrap()
        .walk(&mut Tree::new(std::io::sink()))
        .1
        .unwrap_err();
    assert_eq!(format!("{error:#}"), "the trailer is not a description: a nameless device");
}

#[test]
fn long_names_of_many_values_are_too_much_to_compare() {
    let name = "n".repeat(255);
    let leaf = json!([{ "name": name, "type": "uint8", "size": 1, "array_len": 40_000 }]);
    let entries = (0..20).fold(leaf, |inner, _| {
        json!([{ "name": name, "type": "struct", "size": 40_000, "struct": { "vmsd_name": "s", "fields": inner } }])
    });
    let files = [0, 1].map(|fill| described(&entries, &[fill; 40_000]));
    let error = format!("{:#}", diff(&files[0], &files[1]).unwrap_err());
    assert!(error.contains("too much to compare"), "{error}");
}

#[test]
fn a_section_of_too_many_values_is_not_printed_to_its_end() {
    let entries = json!([{ "name": "a", "type": "struct", "size": 1, "array_len": 3 << 20,
        "struct": { "vmsd_name": "s", "fields": [{ "name": "b", "type": "uint8", "size": 1 }] } }]);
    let bytes = described(&entries, &[0, 1].repeat(3 << 19));
    let (_, result) = input(&bytes).unwrap().walk(&mut Tree::new(std::io::sink()));
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.contains("too much to print"), "{error}");
}

#[test]
fn names_in_errors_cannot_write_on_the_terminal() {
    // A window title, an 8-bit control sequence, and a line that turns around.
    let name = "n\x1b]0;x\x07\u{9b}2J\u{202e}";
    let field = |kind: &str, size: usize| json!({ "name": name, "type": kind, "size": size });
    let mut run = field("uint8", 0);
    run["array_len"] = json!(3);
    let mut hollow = field("struct", 1);
    hollow["struct"] = json!({ "vmsd_name": name });
    let inside = json!([{ "name": "s", "type": "struct", "size": 2, "struct": { "vmsd_name": name, "fields": [field("bool", 1)] } }]);
    let slot = json!([field("ptr-marker", 1), field("uint8", 1)]);
    let mut quoted = 0;
    let list = json!([field("list-marker", 1), field("uint8", 1)]);
    for (entries, payload) in [
        (json!([field("bool", 1)]), &[2][..]),
        (json!([run]), &[]),
        (json!([hollow]), &[0]),
        (inside, &[0, 0]),
        (json!([field("ptr-marker", 1)]), &[7]),
        (json!([field("ptr-marker", 1)]), b"1"),
        (json!([field("ptr-marker", 2)]), &[0, 0]),
        (slot, b"0\0"),
        (json!([field("list-marker", 1)]), &[7]),
        (list, &[1, 0]),
    ] {
        let bytes = described(&entries, payload);
        for result in [tree(&bytes).1, json(&bytes).1, diff(&bytes, &bytes).map(|_| Default::default())] {
            let Err(error) = result else { continue }; // a file does not differ from itself, whatever is in it
            let error = format!("{error:#}");
            assert!(error.chars().all(|one| one.is_ascii() && !one.is_control()), "{error:?}");
            quoted += usize::from(error.contains("u{1b}"));
        }
        tree(&bytes).1.unwrap_err();
        json(&bytes).1.unwrap_err();
    }
    assert!(quoted >= 10, "{quoted} errors quote the name");
}
