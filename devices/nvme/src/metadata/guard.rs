//! The guard of protection information (NVM 5.2.1): the CRC-16 of T10 DIF, polynomial 8BB7h, most significant bit first, beginning with 0.

const POLYNOMIAL: u16 = 0x8bb7;
/// Bytes that one round takes in.
const ROUND_BYTES: usize = 16;

/// `TABLES[n][byte]` is the CRC of `byte` with n bytes of zeroes behind it.
static TABLES: [[u16; 256]; ROUND_BYTES] = tables();

const fn tables() -> [[u16; 256]; ROUND_BYTES] {
    let mut tables = [[0; 256]; ROUND_BYTES];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { crc << 1 ^ POLYNOMIAL } else { crc << 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut behind = 1;
    while behind < ROUND_BYTES {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[behind - 1][byte];
            tables[behind][byte] = before << 8 ^ tables[0][(before >> 8) as usize];
            byte += 1;
        }
        behind += 1;
    }
    tables
}

/// The CRC of what `crc` is the CRC of with `bytes` behind it.
pub(crate) fn guard(mut crc: u16, bytes: &[u8]) -> u16 {
    let (rounds, rest) = bytes.as_chunks::<ROUND_BYTES>();
    for round in rounds {
        let [high, low] = crc.to_be_bytes();
        crc = TABLES[15][usize::from(round[0] ^ high)] ^ TABLES[14][usize::from(round[1] ^ low)];
        for (table, byte) in TABLES[..14].iter().rev().zip(&round[2..]) {
            crc ^= table[usize::from(*byte)];
        }
    }
    rest.iter().fold(crc, |crc, byte| crc << 8 ^ TABLES[0][usize::from((crc >> 8) as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as the polynomial says.
    fn slowly(bytes: &[u8]) -> u16 {
        bytes.iter().fold(0, |crc, &byte| {
            (0..8).rev().fold(crc, |crc: u16, bit| {
                let out = crc >> 15 ^ u16::from(byte >> bit) & 1;
                crc << 1 ^ if out == 1 { POLYNOMIAL } else { 0 }
            })
        })
    }

    #[test]
    fn known_blocks_have_their_known_guards() {
        // The check value of CRC-16/T10-DIF.
        assert_eq!(guard(0, b"123456789"), 0xd0db);
        assert_eq!(guard(0, &[0; 512]), 0);
        assert_eq!(guard(0, b""), 0);
    }

    #[test]
    fn every_length_and_cut_agrees_with_the_polynomial() {
        let bytes: Vec<u8> = (0..600u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 21) as u8).collect();
        for length in 0..bytes.len() {
            let expected = slowly(&bytes[..length]);
            assert_eq!(guard(0, &bytes[..length]), expected, "{length} bytes");
            let (first, second) = bytes[..length].split_at(length / 3);
            assert_eq!(guard(guard(0, first), second), expected, "{length} bytes in two");
        }
    }
}
