//! Configuration space and MSI-X: what a guest can write in both devices, found by their own capability lists. Those of a QEMU device
//! with its usual properties lead to the same offsets as ours.

use pci::{EndpointState, MsixEntryState, MsixState};

use super::limit::QemuLimit;
use super::refuse;
use super::section::CONFIG_BYTES;
use crate::Error;

/// What holds all capabilities but the extended ones, which neither device has.
pub(super) const HEADER_BYTES: usize = 256;
const COMMAND: usize = 0x04;
const CLASS: usize = 0x09;
const HEADER_TYPE: usize = 0x0e;
const BAR_0: usize = 0x10;
const OTHER_BARS: usize = 0x18;
const SUBSYSTEM: usize = 0x2c;
const ROM_BAR: usize = 0x30;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;
const POWER: u8 = 0x01;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
const MSIX_ENABLE: u8 = 1 << 7;
const MSIX_FUNCTION_MASK: u8 = 1 << 6;
const MSIX_CAPABILITY_BYTES: usize = 12;
const POWER_STATE: u8 = 0b11;
const D3HOT: u8 = 0b11;
const ENTRY_BYTES: usize = 16;
const CONFIG: &str = "pci_device.config";

/// Offsets of the three capabilities.
#[derive(Clone, Copy, Debug)]
struct Capabilities {
    power: usize,
    express: usize,
    msix: usize,
}

impl Capabilities {
    /// Walks the list; the error is the first place in it that does not hold, and the identifier there.
    fn find(config: &[u8]) -> Result<Self, (usize, u8)> {
        let (mut power, mut express, mut msix) = (None, None, None);
        let mut link = CAPABILITY_POINTER;
        loop {
            let offset = usize::from(config[link]);
            if offset == 0 {
                break;
            }
            // The longest of the three ends within 60 bytes; and each is there once, so that the list ends.
            let id = config[offset];
            let place = match id {
                POWER => &mut power,
                EXPRESS => &mut express,
                MSIX => &mut msix,
                _ => return Err((link, id)),
            };
            let fits = offset.is_multiple_of(4) && (FIRST_CAPABILITY..=HEADER_BYTES - 60).contains(&offset);
            if !fits || place.replace(offset).is_some() {
                return Err((link, id));
            }
            link = offset + 1;
        }
        let found = |place: Option<usize>, id| place.ok_or((link, id));
        Ok(Self { power: found(power, POWER)?, express: found(express, EXPRESS)?, msix: found(msix, MSIX)? })
    }
}

/// Bytes that both devices have, here and there, and their bits that a guest can write in ours.
fn shared(
    ours: &Capabilities,
    theirs: &Capabilities,
    bar_length_bytes: u64,
) -> impl Iterator<Item = (usize, usize, u8)> {
    let address = (!bar_length_bytes.wrapping_sub(1)).to_le_bytes();
    let bar = address.into_iter().enumerate().map(|(byte, mask)| (BAR_0 + byte, BAR_0 + byte, mask));
    let registers = [
        // Memory, bus master, parity errors; SERR, INTx disable.
        (COMMAND, COMMAND, 0x46),
        (COMMAND + 1, COMMAND + 1, 0x05),
        (INTERRUPT_LINE, INTERRUPT_LINE, 0xff),
        (ours.power + 4, theirs.power + 4, POWER_STATE),
        // Device control.
        (ours.express + 8, theirs.express + 8, 0xff),
        (ours.express + 9, theirs.express + 9, 0x78),
        (ours.msix + 3, theirs.msix + 3, MSIX_ENABLE | MSIX_FUNCTION_MASK),
    ];
    bar.chain(registers)
}

/// Puts what the guest has written into `pci`, the state of an unused controller, and returns the rest.
pub(super) fn split(
    config: &[u8; CONFIG_BYTES],
    table: &[u8],
    pci: &mut EndpointState,
) -> Result<[u8; HEADER_BYTES], Error> {
    let (header, extended) = config.split_at(HEADER_BYTES);
    let at = |offset: usize, reason| refuse(format!("{CONFIG}[{offset:#x}]"), config[offset], reason);
    if let Some(offset) = extended.iter().position(|&byte| byte != 0) {
        return at(HEADER_BYTES + offset, "this controller has no extended capabilities");
    }
    let ours = &mut pci.config.bytes;
    let here = Capabilities::find(ours).or_else(|(_, id)| beyond(id))?;
    let there = match Capabilities::find(header) {
        Ok(found) => found,
        Err((offset, _)) => {
            return at(offset, "the capabilities are not power management, PCI Express and MSI-X");
        }
    };
    // What drivers bind by.
    for offset in (0..COMMAND).chain(CLASS..CLASS + 3).chain([HEADER_TYPE]) {
        if header[offset] != ours[offset] {
            return at(offset, "it is another kind of device");
        }
    }
    let unused = (OTHER_BARS..SUBSYSTEM - 4).chain(ROM_BAR..ROM_BAR + 4).find(|&offset| header[offset] != 0);
    if let Some(offset) = unused {
        return at(offset, "this controller has one BAR and no ROM");
    }
    let mut rest: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
    rest.copy_from_slice(header);
    for (ours_at, theirs_at, mask) in shared(&here, &there, pci.config.bar_length_bytes[0]) {
        ours[ours_at] = ours[ours_at] & !mask | header[theirs_at] & mask;
        rest[theirs_at] &= !mask;
    }
    // With the guest's bits gone, the BAR and the MSI-X capability are the same.
    let same = (BAR_0..BAR_0 + 8).map(|offset| (offset, offset));
    let capability = (2..MSIX_CAPABILITY_BYTES).map(|byte| (here.msix + byte, there.msix + byte));
    if let Some((_, offset)) = same.chain(capability).find(|&(ours_at, at)| ours[ours_at] != header[at]) {
        return at(offset, "its BAR, or the place or size of the MSI-X table in it, is another");
    }
    if !matches!(ours[here.power + 4] & POWER_STATE, 0 | D3HOT) {
        return at(there.power + 4, "the power state does not exist");
    }
    let control = ours[here.msix + 3];
    pci.msix = vectors(table, control)?;
    Ok(rest)
}

fn vectors(table: &[u8], control: u8) -> Result<MsixState, Error> {
    let (enabled, function_masked) = (control & MSIX_ENABLE != 0, control & MSIX_FUNCTION_MASK != 0);
    // 16 bytes and one bit each.
    let count = table.len() * 8 / (ENTRY_BYTES * 8 + 1);
    let (entries, pending) = table.split_at(count * ENTRY_BYTES);
    let at = |offset: usize, reason| refuse(format!("msix[{offset}]"), table[offset], reason);
    let mut vectors = Vec::with_capacity(count);
    for (vector, entry) in entries.as_chunks::<ENTRY_BYTES>().0.iter().enumerate() {
        let word = |start: usize| {
            u32::from_le_bytes([entry[start], entry[start + 1], entry[start + 2], entry[start + 3]])
        };
        let (address, control) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(12));
        if address & 0b11 != 0 {
            return at(vector * ENTRY_BYTES, "the address is not a multiple of 4");
        }
        if control > 1 {
            let byte = entry[12..].iter().position(|&byte| byte > 1).unwrap_or(0);
            return at(vector * ENTRY_BYTES + 12 + byte, "it has reserved bits set");
        }
        let (masked, pending) = (control == 1, pending[vector / 8] >> (vector % 8) & 1 == 1);
        if pending && (!enabled || !function_masked && !masked) {
            let reason = "a vector is pending that is not masked, or MSI-X is off";
            return at(entries.len() + vector / 8, reason);
        }
        vectors.push(MsixEntryState { address, data: word(8), masked, pending });
    }
    let beyond = pending.last().is_some_and(|&last| !count.is_multiple_of(8) && last >> (count % 8) != 0);
    if beyond {
        return at(table.len() - 1, "a vector is pending that does not exist");
    }
    // At most 2,048, as the field's maximum says.
    Ok(MsixState { count: vectors.len() as u16, entries: vectors })
}

/// Whether MSI-X is on in a state of ours, so that the pin is not used.
pub(super) fn sends_messages(pci: &EndpointState) -> Result<bool, Error> {
    let config = &pci.config.bytes;
    let here = Capabilities::find(config).or_else(|(_, id)| beyond(id))?;
    Ok(config[here.msix + 3] & MSIX_ENABLE != 0)
}

/// QEMU's configuration space and MSI-X table with what the guest has written in ours.
pub(super) fn join(
    pci: &EndpointState,
    rest: &[u8; HEADER_BYTES],
) -> Result<([u8; CONFIG_BYTES], Vec<u8>), Error> {
    let ours = &pci.config.bytes;
    let here = Capabilities::find(ours).or_else(|(_, id)| beyond(id))?;
    let there = Capabilities::find(rest).or_else(|(_, id)| beyond(id))?;
    let mut config = [0; CONFIG_BYTES];
    config[..HEADER_BYTES].copy_from_slice(rest);
    for (ours_at, theirs_at, mask) in shared(&here, &there, pci.config.bar_length_bytes[0]) {
        config[theirs_at] = config[theirs_at] & !mask | ours[ours_at] & mask;
    }
    let entries = &pci.msix.entries;
    let mut table = Vec::with_capacity(entries.len() * ENTRY_BYTES + entries.len().div_ceil(8));
    for entry in entries {
        table.extend_from_slice(&entry.address.to_le_bytes());
        table.extend_from_slice(&entry.data.to_le_bytes());
        table.extend_from_slice(&u32::from(entry.masked).to_le_bytes());
    }
    for vectors in entries.chunks(8) {
        table.push(
            vectors.iter().enumerate().fold(0, |bits, (bit, entry)| bits | u8::from(entry.pending) << bit),
        );
    }
    Ok((config, table))
}

/// The configuration space of a QEMU device whose guest has done nothing, with the MSI-X table where `ours` has it: MSI-X at 0x40, power
/// management at 0x60, PCI Express at 0x80.
pub(super) fn of_a_new_device(ours: &[u8; HEADER_BYTES]) -> Result<[u8; HEADER_BYTES], Error> {
    let here = Capabilities::find(ours).or_else(|(_, id)| beyond(id))?;
    let mut config = [0; HEADER_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &ours[..COMMAND]);
    // Status: there are capabilities. Revision 2.
    put(0x06, &[0x10, 0, 2]);
    put(CLASS, &ours[CLASS..CLASS + 3]);
    put(BAR_0, &[0x04]);
    // Red Hat, the subsystem of all QEMU's devices.
    put(SUBSYSTEM, &[0xf4, 0x1a, 0x00, 0x11]);
    put(CAPABILITY_POINTER, &[0x40]);
    put(INTERRUPT_LINE + 1, &[1]);
    put(0x40, &[MSIX, 0x80]);
    put(0x42, &ours[here.msix + 2..here.msix + MSIX_CAPABILITY_BYTES]);
    put(0x60, &[POWER, 0, 3, 0, 1 << 3]);
    // Version 2, integrated endpoint; extended tags, role-based error reporting, function level reset.
    put(0x80, &[EXPRESS, 0x60, 0x92, 0, 0x20, 0x80, 0, 0x10]);
    // A link of 2.5 GT/s and one lane, active state power management L0s; end-to-end prefixes.
    put(0x8c, &[0x11, 0x04]);
    put(0x92, &[0x11]);
    put(0xa6, &[0x30]);
    config[0x43] &= !(MSIX_ENABLE | MSIX_FUNCTION_MASK);
    Ok(config)
}

fn beyond<T>(id: u8) -> Result<T, Error> {
    Err(Error::BeyondQemu(QemuLimit::Capability { id }))
}
