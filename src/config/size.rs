//! Sizes as people write them.

use super::Error;

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// Parses `4096`, `64K`, `512M`, `4G`, `1T` (powers of 1024; an `iB` after the letter is allowed) into bytes.
///
/// # Errors
/// [`Error::Size`] if it is not a number, or does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, Error> {
    let error = || Error::Size { text: text.to_owned() };
    let upper = text.trim().to_ascii_uppercase();
    let digits = upper.strip_suffix("IB").unwrap_or(&upper);
    let (digits, shift) = UNITS
        .iter()
        .find_map(|&(letter, shift)| digits.strip_suffix(letter).map(|rest| (rest, shift)))
        .unwrap_or((digits, 0));
    if upper.ends_with("IB") && shift == 0 {
        return Err(error());
    }
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// The shortest exact way to write `bytes`, as [`parse_size`] reads it.
#[must_use]
pub fn display_size(bytes: u64) -> String {
    UNITS
        .iter()
        .rev()
        .find(|(_, shift)| bytes != 0 && bytes.is_multiple_of(1 << shift))
        .map_or_else(|| bytes.to_string(), |(letter, shift)| format!("{}{letter}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back_as_they_are_written() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 65536),
            ("512m", 512 << 20),
            ("4GiB", 4 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
            assert_eq!(parse_size(&display_size(bytes)), Ok(bytes), "{text}");
        }
        assert_eq!(display_size(1536 << 20), "1536M");
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "-1", "1.5G", "12iB", "1X", "99999999999T", "18446744073709551616"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
