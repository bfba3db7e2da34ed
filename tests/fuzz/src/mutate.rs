//! Mutations of inputs, the same in every run.

/// Numbers that follow from a seed (xorshift64*).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, or 0 if there is none.
    pub fn below(&mut self, limit: usize) -> usize {
        self.number().checked_rem(limit as u64).unwrap_or_default() as usize
    }
}

/// Lengths, counts and offsets that are worth trying.
const NUMBERS: [u64; 10] =
    [0, 1, 0x7f, 0xff, 0x1000, 0x7fff_ffff, 0xffff_ffff, 0x10_0000_0000, i64::MAX as u64, u64::MAX];

/// Changes `input` in one to four places: bits, bytes, numbers, pieces cut out, doubled, or taken from `other`.
pub fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(input.len());
        let length = 1 + random.below(16);
        let end = input.len().min(at + length);
        match random.below(8) {
            0 => input.truncate(at),
            1 | 2 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            3 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.number() as u8;
                }
            }
            4 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_be_bytes();
                let bytes = &number[8 - (1 << random.below(4))..];
                input.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
            }
            5 => drop(input.drain(at..end)),
            6 => {
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            _ => {
                let from = random.below(other.len());
                let piece = other.iter().skip(from).take(length * 8).copied();
                input.splice(at..end, piece.collect::<Vec<_>>());
            }
        }
    }
}
