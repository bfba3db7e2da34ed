//! What a PVH loader passes: struct hvm_start_info (Xen, `public/arch-x86/hvm/start_info.h`).

use alloc::string::String;

/// First field of the structure: "xEn3" with the 0x80 bit of the "E" set.
pub const MAGIC: u32 = 0x336e_c578;

/// Largest command line that is read, in bytes.
const COMMAND_LINE_BYTES: u64 = 4096;
/// Most entries of the memory map that are read.
const MEMORY_MAP_ENTRIES: u32 = 256;
const MEMORY_MAP_ENTRY_BYTES: u64 = 24;
const MEMORY_TYPE_RAM: u32 = 1;

const OFFSET_MAGIC: u64 = 0;
const OFFSET_VERSION: u64 = 4;
const OFFSET_COMMAND_LINE: u64 = 24;
const OFFSET_MEMORY_MAP: u64 = 40;
const OFFSET_MEMORY_MAP_ENTRIES: u64 = 48;

/// Reads physical memory; None outside what is mapped.
pub type ReadByte<'a> = &'a dyn Fn(u64) -> Option<u8>;

/// What the exerciser uses of the structure.
#[derive(Debug, PartialEq, Eq)]
pub struct StartInfo {
    /// Where the command line is; 0 without one.
    command_line: u64,
    /// End of the RAM region that holds the given address (see [`StartInfo::read`]).
    pub ram_end: u64,
}

impl StartInfo {
    /// Reads the structure at `address`, and finds the RAM region that holds `inside`.
    ///
    /// # Errors
    ///
    /// A sentence on what is missing.
    pub fn read(read: ReadByte<'_>, address: u64, inside: u64) -> Result<Self, &'static str> {
        let word = |offset: u64| number::<4>(read, address.checked_add(offset)?).map(|value| value as u32);
        let quad = |offset: u64| number::<8>(read, address.checked_add(offset)?);
        if word(OFFSET_MAGIC) != Some(MAGIC) {
            return Err("no PVH start info");
        }
        if word(OFFSET_VERSION).is_none_or(|version| version < 1) {
            return Err("PVH start info without a memory map");
        }
        let command_line = quad(OFFSET_COMMAND_LINE).unwrap_or(0);
        let map = quad(OFFSET_MEMORY_MAP).unwrap_or(0);
        let entries = word(OFFSET_MEMORY_MAP_ENTRIES).unwrap_or(0).min(MEMORY_MAP_ENTRIES);
        (0..u64::from(entries))
            .find_map(|index| {
                let entry = map.checked_add(index * MEMORY_MAP_ENTRY_BYTES)?;
                let start = number::<8>(read, entry)?;
                let end = start.checked_add(number::<8>(read, entry.checked_add(8)?)?)?;
                let kind = number::<4>(read, entry.checked_add(16)?)? as u32;
                (kind == MEMORY_TYPE_RAM && (start..end).contains(&inside)).then_some(end)
            })
            .map(|ram_end| Self { command_line, ram_end })
            .ok_or("the memory map has no RAM where the image is")
    }

    /// The command line, up to its zero byte. The first thing here that needs an allocator.
    pub fn command_line(&self, read: ReadByte<'_>) -> String {
        let length = if self.command_line == 0 { 0 } else { COMMAND_LINE_BYTES };
        (0..length)
            .map_while(|offset| read(self.command_line.checked_add(offset)?).filter(|byte| *byte != 0))
            .map(char::from)
            .collect()
    }
}

/// A little-endian number of N bytes.
fn number<const N: usize>(read: ReadByte<'_>, address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    for (offset, byte) in bytes.iter_mut().take(N).enumerate() {
        *byte = read(address.checked_add(offset as u64)?)?;
    }
    Some(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn memory() -> Vec<u8> {
        let mut memory = std::vec![0; 0x300];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x10, &MAGIC.to_le_bytes());
        put(0x14, &1u32.to_le_bytes());
        put(0x28, &0x100u64.to_le_bytes());
        put(0x38, &0x200u64.to_le_bytes());
        put(0x40, &2u32.to_le_bytes());
        put(0x100, b"mode=iops help\0rest");
        for (at, start, length, kind) in
            [(0x200, 0u64, 0x9_fc00u64, 1u32), (0x218, 0x10_0000, 0x3ff0_0000, 1)]
        {
            put(at, &start.to_le_bytes());
            put(at + 8, &length.to_le_bytes());
            put(at + 16, &kind.to_le_bytes());
        }
        memory
    }

    fn byte(memory: &[u8], address: u64) -> Option<u8> {
        memory.get(usize::try_from(address).ok()?).copied()
    }

    fn read(memory: &[u8], inside: u64) -> Result<StartInfo, &'static str> {
        StartInfo::read(&|address| byte(memory, address), 0x10, inside)
    }

    #[test]
    fn command_line_and_ram_are_found() {
        let memory = memory();
        let info = read(&memory, 0x20_0000).unwrap();
        assert_eq!(info.ram_end, 0x4000_0000);
        assert_eq!(info.command_line(&|address| byte(&memory, address)), "mode=iops help");
        assert_eq!(info.command_line(&|address| byte(&memory[..0x104], address)), "mode");
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut broken = memory();
        broken[0x10] = 0;
        assert_eq!(read(&broken, 0x20_0000), Err("no PVH start info"));
        let mut broken = memory();
        broken[0x14] = 0;
        assert_eq!(read(&broken, 0x20_0000), Err("PVH start info without a memory map"));
        assert_eq!(read(&memory(), 0x4000_0000), Err("the memory map has no RAM where the image is"));
        let mut reserved = memory();
        reserved[0x228] = 2;
        assert_eq!(read(&reserved, 0x20_0000), Err("the memory map has no RAM where the image is"));
        assert_eq!(read(&memory()[..0x210], 0x20_0000), Err("the memory map has no RAM where the image is"));
    }
}
