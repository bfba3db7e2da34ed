//! Names and values as people read them. Whatever they hold, nothing reaches the terminal but text.

use std::fmt;

use anyhow::Context;
use stream::described::{Array, Value, set_bits};

/// Bytes of a buffer that are shown.
const BUFFER_BYTES_SHOWN: usize = 16;
/// Numbers, or ranges of bits, that are shown of many.
const RUN_SHOWN: usize = 16;
/// The shortest text that is not taken for chance.
const TEXT_BYTES_MIN: usize = 3;

/// A name from a file, with everything escaped that is not printed.
pub struct Name<'a>(pub &'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character.is_control() || !is_plain(character) {
                true => write!(f, "{}", character.escape_unicode())?,
                false => write!(f, "{character}")?,
            }
        }
        Ok(())
    }
}

/// Whether a character stands for itself: no mark that turns the direction of a line, and the like.
fn is_plain(character: char) -> bool {
    character.is_ascii() || character.is_alphanumeric()
}

/// All the bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// The text in a buffer that holds nothing else but NULs behind it.
pub fn as_text(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().rposition(|byte| *byte != 0)?;
    let text = bytes.get(..=end).filter(|text| text.len() >= TEXT_BYTES_MIN)?;
    let is_text = text.iter().all(|byte| (0x20..0x7f).contains(byte));
    std::str::from_utf8(text).ok().filter(|_| is_text)
}

/// A value that fits on a line; structs, lists and slots do not.
pub fn line(value: &Value<'_>) -> anyhow::Result<Option<String>> {
    Ok(Some(match value {
        Value::Bool(value) => value.to_string(),
        Value::Unsigned(value) => unsigned(*value),
        Value::Signed(value) => value.to_string(),
        Value::Bytes(bytes) => buffer(bytes),
        Value::Bitmap(words) => bitmap(words),
        Value::Array(array) => return run(array),
        Value::Struct(_) | Value::List(_) | Value::Elements(_) | Value::Slots(_) => return Ok(None),
    }))
}

fn unsigned(value: u64) -> String {
    if value < 16 { value.to_string() } else { format!("{value} ({value:#x})") }
}

fn buffer(bytes: &[u8]) -> String {
    let length = match bytes.len() {
        1 => "1 byte".to_owned(),
        length => format!("{length} bytes"),
    };
    if let Some(text) = as_text(bytes) {
        return format!("{text:?}, {length}");
    }
    if bytes.len() > BUFFER_BYTES_SHOWN && bytes.iter().all(|byte| *byte == 0) {
        return format!("00..., {length} of zeros");
    }
    match bytes.get(..BUFFER_BYTES_SHOWN) {
        Some(start) if start.len() < bytes.len() => format!("{}..., {length}", hex(start)),
        _ if bytes.is_empty() => length,
        _ => format!("{}, {length}", hex(bytes)),
    }
}

fn bitmap(words: &[u8]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    let mut more = false;
    for bit in set_bits(words) {
        let is_full = ranges.len() == RUN_SHOWN;
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == bit => *last = bit,
            _ if is_full => {
                more = true;
                break;
            }
            _ => ranges.push((bit, bit)),
        }
    }
    let each = ranges.iter().map(|range| match range {
        (first, last) if first == last => format!("{first}"),
        (first, last) => format!("{first}-{last}"),
    });
    let bits = words.len() * 8;
    match each.collect::<Vec<_>>().join(" ") {
        none if none.is_empty() => format!("no bit of {bits}"),
        some if more => format!("bits {some} ... of {bits}"),
        some => format!("bits {some} of {bits}"),
    }
}

/// Numbers in a row, if the elements are such.
fn run(array: &Array<'_>) -> anyhow::Result<Option<String>> {
    let count = array.count();
    let mut shown = Vec::new();
    for index in 0..count.min(RUN_SHOWN) {
        shown.push(match array.get(index).with_context(|| format!("[{index}]"))? {
            Value::Bool(value) => value.to_string(),
            Value::Unsigned(value) => value.to_string(),
            Value::Signed(value) => value.to_string(),
            _ => return Ok(None),
        });
    }
    let first = array.element_bytes(0);
    if count > RUN_SHOWN && (1..count).all(|index| array.element_bytes(index) == first) {
        return Ok(shown.first().map(|first| format!("{count} x {first}")));
    }
    let more = if count > RUN_SHOWN { format!(" ..., {count} in all") } else { String::new() };
    Ok(Some(shown.join(" ") + &more))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_write_on_the_terminal() {
        assert_eq!(Name("0000:00:04.0/nvme x").to_string(), "0000:00:04.0/nvme x");
        assert_eq!(Name("a\x1b[2Jb\n\u{202e}").to_string(), "a\\u{1b}[2Jb\\u{a}\\u{202e}");
    }

    #[test]
    fn buffers_are_short_and_text_is_readable() {
        assert_eq!(buffer(b"pc-q35\0\0"), "\"pc-q35\", 8 bytes");
        assert_eq!(buffer(b"\x01\xff"), "01ff, 2 bytes");
        assert_eq!(buffer(&[0xab; 17]), "abababababababababababababababab..., 17 bytes");
        assert_eq!(buffer(&[0; 64]), "00..., 64 bytes of zeros");
        assert_eq!(buffer(b"A"), "41, 1 byte");
        assert_eq!(buffer(b""), "0 bytes");
    }

    #[test]
    fn bitmaps_are_ranges() {
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
        assert_eq!(bitmap(&words(&[0])), "no bit of 64");
        assert_eq!(bitmap(&words(&[1 << 63 | 0b1101, 1])), "bits 0 2-3 63-64 of 128");
        let many = bitmap(&words(&[0x5555_5555_5555]));
        assert_eq!(many, "bits 0 2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 ... of 64");
        assert_eq!(bitmap(&words(&[0x5555_5555])), "bits 0 2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 of 64");
    }
}
