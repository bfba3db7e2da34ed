use super::{All, Number, all};
use crate::{Bitmap, Problem, VmState, from_bytes, measure, schema, to_bytes};

#[test]
fn every_kind_of_field_has_its_bytes() {
    let mut expected = vec![1, 7];
    expected.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]);
    expected.extend(b"hello");
    expected.extend([0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6]);
    expected.extend([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]);
    expected.extend([0, 0, 0, 100]);
    expected.extend([0, 0, 0, 3, 1, 2, 3]);
    expected.extend([2, 0, 1, b'0', 0, 1, b'1', 0, 0, 0, 1]);
    expected.extend([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 2]);
    expected.extend([1, 0, 0, 0, 4, 1, 0, 0, 0, 5, 0]);
    expected.extend([0, 70, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x20]);
    expected.extend([0x12, 0x34, 4]);
    expected.extend(b"\x05\x08all/part\0\0\0\x02\x01\x02");
    expected.extend(b"\x05\x09all/other\0\0\0\x01\0\x03");
    assert_eq!(to_bytes(&all()), expected);
    assert_eq!(from_bytes::<All>(&expected, 3), Ok(all()));
}

#[test]
fn bounds_and_checks_name_the_field() {
    let refusal = |change: fn(&mut All)| {
        let mut state = all();
        change(&mut state);
        from_bytes::<All>(&to_bytes(&state), 3).unwrap_err().to_string()
    };
    assert_eq!(refusal(|state| state.level = 101), "level: 101 is above 100");
    assert_eq!(refusal(|state| state.level = 0), "level: 0 is below 1");
    assert_eq!(refusal(|state| state.even = 5), "even: 5 is odd");
    assert_eq!(refusal(|state| state.byte = 0xff), "flag is set with byte 0xff");
    assert_eq!(
        refusal(|state| state.queue = vec![Number { value: 0 }; 4]),
        "queue: the list has more than 3 elements"
    );
}

#[test]
fn paths_go_down_to_the_element() {
    let mut bytes = to_bytes(&all());
    let marker = bytes.windows(4).position(|window| window == [1, b'1', 0, 0]).unwrap() + 1;
    bytes[marker] = b'2';
    let error = from_bytes::<All>(&bytes, 3).unwrap_err();
    assert_eq!(error.path, "numbers[1].items[0]");
}

#[test]
fn bools_and_spare_bits_are_strict() {
    let mut bytes = to_bytes(&all());
    bytes[0] = 2;
    assert_eq!(from_bytes::<All>(&bytes, 3).unwrap_err().to_string(), "flag: 0x02 is not a bool");
    assert_eq!(Bitmap::from_words(70, vec![0, 1 << 6]), None);
    assert_eq!(Bitmap::from_words(70, vec![0]), None);
    assert!(Bitmap::from_words(64, vec![u64::MAX]).unwrap().get(63));
}

#[test]
fn every_truncation_and_every_extra_byte_is_refused() {
    let bytes = to_bytes(&all());
    // The subsections are optional: without them the state is complete.
    let complete: Vec<usize> =
        (0..bytes.len()).filter(|length| from_bytes::<All>(&bytes[..*length], 3).is_ok()).collect();
    assert_eq!(complete, [bytes.len() - 33, bytes.len() - 17]);
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(from_bytes::<All>(&longer, 3).unwrap_err().problem, Problem::LeftOver { bytes: 1 });
}

#[test]
fn length_is_measured_once_the_bytes_decide_it() {
    // A section is followed by its footer, so the last subsection is known to be the last.
    let bytes = to_bytes(&all());
    let mut stream = bytes.clone();
    stream.extend([0x7e, 0, 0, 0, 1]);
    for length in 0..stream.len() {
        let measured = measure::<All>(&stream[..length], 3);
        if length > bytes.len() {
            assert_eq!(measured, Ok(bytes.len()));
        } else {
            let Problem::Truncated { needed, left } = measured.unwrap_err().problem else {
                panic!("of {length} bytes")
            };
            // What is waited for comes: the state, and one byte to see that no other subsection follows.
            assert!(needed > left && length as u64 + needed - left <= bytes.len() as u64 + 1, "of {length}");
        }
    }
}

#[test]
fn a_field_may_have_the_name_of_a_keyword() {
    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "keywords")]
    struct Keywords {
        #[vmstate(max = 3)]
        r#type: u8,
        r#box: u8,
        #[vmstate(len = "box", max = 3)]
        r#loop: Vec<u8>,
    }

    let state = Keywords { r#type: 3, r#box: 1, r#loop: vec![7] };
    assert_eq!(to_bytes(&state), [3, 1, 7]);
    assert_eq!(from_bytes::<Keywords>(&[3, 1, 7], 1), Ok(state));
    let names = schema::<Keywords>().fields.into_iter().map(|field| (field.name, field.count));
    assert_eq!(names.collect::<Vec<_>>(), [("type", None), ("box", None), ("loop", Some("box"))]);
    for (bytes, error) in [([4, 0], "type: 4 is above 3"), ([0, 4], "box: 4 is above 3")] {
        assert_eq!(from_bytes::<Keywords>(&bytes, 1).unwrap_err().to_string(), error);
    }
}
