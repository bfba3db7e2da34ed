//! The constants of the stream, and vectored writing.

use std::io::{self, IoSlice, Write};

pub const MAGIC: u32 = 0x5145_564d; // "QEVM"
pub const VERSION: u32 = 3;

/// What the byte before a section means.
pub mod mark {
    pub const END: u8 = 0x00;
    pub const SECTION_START: u8 = 0x01;
    pub const SECTION_PART: u8 = 0x02;
    pub const SECTION_END: u8 = 0x03;
    pub const SECTION_FULL: u8 = 0x04;
    pub const TRAILER: u8 = 0x06;
    pub const CONFIGURATION: u8 = 0x07;
    pub const COMMAND: u8 = 0x08;
    pub const FOOTER: u8 = 0x7e;
}

/// Names of sections and RAM blocks stay below 128 bytes: some readers take the length byte for a signed one.
pub const NAME_BYTES_MAX: usize = 127;
/// The largest device section.
pub const SECTION_BYTES_MAX: usize = 64 << 20;
/// Device sections in one stream.
pub const SECTIONS_MAX: usize = 4096;
/// The largest trailer: foreign tools look for it in the last 10 MiB of the file.
pub const TRAILER_BYTES_MAX: usize = (10 << 20) - 1;

/// The largest package: it holds every device, and is held in memory by its receiver.
pub const PACKAGE_BYTES_MAX: u32 = 32 << 20;

/// Writes all of the slices, with as few calls as the writer allows.
pub fn write_all_vectored(out: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0); // skips empty ones, for which `write` rightly returns 0
    while !slices.is_empty() {
        match out.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
