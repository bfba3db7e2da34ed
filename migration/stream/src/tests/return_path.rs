//! The return path: bytes of every message, refusals, and anything at all.

use proptest::prelude::*;
use vmstate::Bitmap;

use crate::return_path::{Message, ReturnPath};
use crate::*;

fn blocks() -> Vec<RamBlock> {
    vec![RamBlock::new("ram", 1 << 20), RamBlock::new("rom", 8192)]
}

fn path() -> ReturnPath {
    ReturnPath::new(blocks())
}

fn request(block: usize, offset: u64) -> Message {
    Message::RequestPages { block, offset, length_bytes: 4096 }
}

fn bitmap(set: &[usize]) -> Bitmap {
    let mut pages = Bitmap::new(2);
    set.iter().for_each(|page| pages.set(*page, true));
    pages
}

const BITMAP: &[u8] =
    b"\0\x05\0\x04\x03rom\0\0\0\0\0\0\0\x08\x02\0\0\0\0\0\0\0\x01\x23\x45\x67\x89\xab\xcd\xef";

#[test]
fn messages_have_their_bytes_and_every_cut_one_waits_for_more() {
    let (mut sender, mut receiver) = (path(), path());
    for (message, wire) in [
        (Message::Shut { error: 5 }, b"\0\x01\0\x04\0\0\0\x05".as_slice()),
        (Message::Pong { value: 0x0102_0304 }, b"\0\x02\0\x04\x01\x02\x03\x04"),
        (request(0, 0x3000), b"\0\x03\0\x10\0\0\0\0\0\0\x30\0\0\0\x10\0\x03ram"),
        (request(0, 0x4000), b"\0\x04\0\x0c\0\0\0\0\0\0\x40\0\0\0\x10\0"),
        (request(1, 0), b"\0\x03\0\x10\0\0\0\0\0\0\0\0\0\0\x10\0\x03rom"),
        (Message::ReceivedBitmap { block: 1, pages: bitmap(&[1]) }, BITMAP),
        (Message::ResumeAck, b"\0\x06\0\x04\0\0\0\x01"),
        (Message::SwitchoverAck, b"\0\x07\0\0"),
    ] {
        let mut bytes = Vec::new();
        sender.encode(&message, &mut bytes).unwrap();
        assert_eq!(bytes, wire, "{message:?}");
        for length in 0..bytes.len() {
            assert_eq!(receiver.decode(&bytes[..length]).unwrap(), None, "{length} of {message:?}");
        }
        bytes.push(0x77);
        assert_eq!(receiver.decode(&bytes).unwrap(), Some((message, bytes.len() - 1)));
    }
}

#[test]
fn wrong_messages_are_refused() {
    let refusal = |bytes: &[u8]| path().decode(bytes).unwrap_err().to_string();
    assert_eq!(refusal(&[0, 0, 0, 0]), "unknown message 0 on the return path");
    assert_eq!(refusal(&[0, 8, 0, 0]), "unknown message 8 on the return path");
    assert_eq!(refusal(&[0, 2, 2, 1]), "length of a message: 513 is above 512");
    assert_eq!(refusal(b"\0\x02\0\x03\0\0\0"), "pong: needs 4 bytes but only 3 are left");
    assert_eq!(refusal(b"\0\x07\0\x01\0"), "switchover acknowledgement: 1 bytes are left over");
    assert_eq!(refusal(b"\0\x06\0\x04\0\0\0\x02"), "resume acknowledgement: 2 is not 1");
    assert_eq!(
        refusal(b"\0\x04\0\x0c\0\0\0\0\0\0\x40\0\0\0\x10\0"),
        "request pages: the first request names no block"
    );
    assert_eq!(
        refusal(b"\0\x03\0\x10\0\0\0\0\0\0\x30\0\0\0\x10\0\x03hdd"),
        "request pages: there is no block \"hdd\""
    );
    assert_eq!(
        refusal(b"\0\x03\0\x10\0\0\0\0\0\0\x20\0\0\0\x10\0\x03rom"),
        "request pages: 0x1000 bytes at 0x2000 are not pages of block \"rom\" of 0x2000 bytes"
    );
    let changed = |at: usize, to: u8| {
        let mut bytes = BITMAP.to_vec();
        bytes[at] = to;
        refusal(&bytes)
    };
    assert_eq!(changed(15, 16), "received bitmap: 16 bytes for block \"rom\", whose bitmap has 8");
    assert_eq!(changed(16, 4), "received bitmap: bits are set beyond the pages of block \"rom\"");
    assert_eq!(changed(31, 0), "received bitmap: it ends with 0x123456789abcd00, not with 0x123456789abcdef");
}

#[test]
fn a_refused_request_names_no_block() {
    let mut path = path();
    assert!(path.decode(b"\0\x03\0\x10\0\0\0\0\0\0\x20\0\0\0\x10\0\x03rom").is_err());
    assert!(path.decode(b"\0\x04\0\x0c\0\0\0\0\0\0\0\0\0\0\x10\0").is_err());
}

#[test]
fn messages_about_pages_that_are_not_there_are_not_written() {
    let mut out = Vec::new();
    for message in [
        request(2, 0),
        request(1, 8192),
        request(0, 1),
        Message::RequestPages { block: 0, offset: 0, length_bytes: 0 },
        Message::ReceivedBitmap { block: 0, pages: bitmap(&[]) },
        Message::ReceivedBitmap { block: 2, pages: bitmap(&[]) },
    ] {
        assert!(path().encode(&message, &mut out).is_err(), "{message:?}");
    }
    assert!(out.is_empty());
}

fn messages() -> impl Strategy<Value = Message> {
    prop_oneof![
        any::<u32>().prop_map(|error| Message::Shut { error }),
        any::<u32>().prop_map(|value| Message::Pong { value }),
        (0..256_u64).prop_map(|page| request(0, page * 4096)),
        (0..2_u64).prop_map(|page| request(1, page * 4096)),
        prop::collection::vec(0..2_usize, 0..2)
            .prop_map(|set| Message::ReceivedBitmap { block: 1, pages: bitmap(&set) }),
        Just(Message::ResumeAck),
        Just(Message::SwitchoverAck),
    ]
}

proptest! {
    #[test]
    fn any_messages_come_back(messages in prop::collection::vec(messages(), 0..20)) {
        let (mut sender, mut receiver, mut bytes) = (path(), path(), Vec::new());
        messages.iter().try_for_each(|message| sender.encode(message, &mut bytes)).unwrap();
        let mut rest = bytes.as_slice();
        for message in &messages {
            let (came, length) = receiver.decode(rest).unwrap().expect("it is whole");
            prop_assert_eq!(&came, message);
            rest = &rest[length..];
        }
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn random_messages_never_panic(
        number in 0..9_u8,
        data in prop::collection::vec(any::<u8>(), 0..40),
        after in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut path = path();
        let bytes = [&[0, number, 0, data.len() as u8], data.as_slice(), &after].concat();
        if let Ok(Some((message, length))) = path.decode(&bytes) {
            let mut again = Vec::new();
            ReturnPath::new(blocks()).encode(&message, &mut again).unwrap();
            prop_assert_eq!(&again, &bytes[..length]);
        }
    }
}
