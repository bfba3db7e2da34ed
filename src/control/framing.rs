//! Where one request ends and the next begins: QMP clients need not send newlines, so brackets are counted.

/// Splits a stream of bytes into JSON values without understanding them. Work and memory are linear in the bytes seen.
///
/// Text that cannot become a value ends early (a bracket too many, a newline in a string, a word), so that the parser
/// refuses it and the client can go on.
#[derive(Debug, Default)]
pub(super) struct Framer {
    message: Vec<u8>,
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Framer {
    /// Bytes of the value that has begun.
    pub fn pending_bytes(&self) -> usize {
        self.message.len()
    }

    /// Takes one byte; a value that it completes comes back.
    pub fn push(&mut self, byte: u8) -> Option<Vec<u8>> {
        let blank = byte.is_ascii_whitespace();
        if self.message.is_empty() && blank {
            return None;
        }
        self.message.push(byte);
        let complete = if self.in_string { self.string_byte(byte) } else { self.plain_byte(byte, blank) };
        complete.then(|| std::mem::take(self).message)
    }

    fn string_byte(&mut self, byte: u8) -> bool {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.in_string = false,
            _ => {}
        }
        byte == b'\n'
    }

    fn plain_byte(&mut self, byte: u8, blank: bool) -> bool {
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        blank && self.depth == 0
    }
}
