//! Protection information (NVM 5.2): eight bytes of a block's metadata that say what its data are, whose, and where.
//!
//! ```text
//! byte 0      1      2      3      4 .. 7
//!      guard (CRC)   application   reference tag      most significant byte first
//! ```

use nvme_spec::{Status, SubmissionEntry, opcode};

use super::guard::guard;

/// Bytes of the protection information of a block.
pub(crate) const PROTECTION_BYTES: usize = 8;
/// What the application tag of a block has that is not to be checked.
const UNCHECKED_APPLICATION: u16 = 0xffff;
/// With type 3 its reference tag has this too.
const UNCHECKED_REFERENCE: u32 = 0xffff_ffff;

/// How the blocks of a namespace are protected (Identify Namespace DPS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protection {
    /// Type 1, 2 or 3.
    pub kind: u8,
    /// It is the first eight bytes of the metadata, not the last.
    pub first: bool,
}

/// What a command wants to be done about protection information (PRINFO, and the tags of CDW14 and CDW15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// PRACT: the controller makes it of a write, and keeps it from who reads.
    pub action: bool,
    /// PRCHK bit 2.
    pub guard: bool,
    /// PRCHK bit 1.
    pub application: bool,
    /// PRCHK bit 0.
    pub reference: bool,
    /// LBAT, ELBAT.
    pub application_tag: u16,
    /// LBATM, ELBATM.
    pub application_mask: u16,
    /// ILBRT, EILBRT: that of the first block.
    pub reference_tag: u32,
}

impl Wanted {
    /// From the fields of a command: PRINFO in the low four bits, the reference tag, and the application tag with its mask above it.
    pub fn new(prinfo: u32, reference_tag: u32, application: u32) -> Self {
        Self {
            action: prinfo & 8 != 0,
            guard: prinfo & 4 != 0,
            application: prinfo & 2 != 0,
            reference: prinfo & 1 != 0,
            application_tag: application as u16,
            application_mask: (application >> 16) as u16,
            reference_tag,
        }
    }

    /// Of a command that has them where Read and Write have.
    pub fn of(entry: &SubmissionEntry) -> Self {
        let prinfo = (entry.cdw12 & opcode::CDW12_PRINFO_MASK) >> 26;
        Self::new(prinfo, entry.cdw14, entry.cdw15)
    }

    /// Whether anything is to be checked.
    pub fn checks(&self) -> bool {
        self.guard || self.application || self.reference
    }
}

impl Protection {
    /// Whether a command to blocks from `first` on can ask for this. A check of reference tags is Invalid Protection Information with type 1
    /// if the initial tag is not the low 32 bits of the first block's address, and with type 3, whose tags say nothing (NVM 5.2.3).
    pub fn allows(&self, wanted: &Wanted, first: u64) -> Result<(), Status> {
        let is_wrong = match self.kind {
            1 => wanted.reference_tag != first as u32,
            3 => true,
            _ => false,
        };
        if wanted.reference && is_wrong {
            return Err(Status::INVALID_PROTECTION_INFORMATION.do_not_retry());
        }
        Ok(())
    }

    /// Where it is in metadata of `bytes`.
    pub fn place(&self, bytes: usize) -> std::ops::Range<usize> {
        let start = if self.first { 0 } else { bytes.saturating_sub(PROTECTION_BYTES) };
        start..start + PROTECTION_BYTES
    }

    /// The guard of a block: of its data and of the metadata in front of the protection information.
    fn guard_of(&self, data: &[u8], metadata: &[u8]) -> u16 {
        guard(guard(0, data), &metadata[..self.place(metadata.len()).start])
    }

    /// The reference tag that block `index` of a command has: it counts with types 1 and 2.
    fn reference_of(&self, wanted: &Wanted, index: u64) -> u32 {
        match self.kind {
            3 => wanted.reference_tag,
            _ => wanted.reference_tag.wrapping_add(index as u32),
        }
    }

    /// Checks block `index` of a command.
    pub fn check(&self, wanted: &Wanted, index: u64, data: &[u8], metadata: &[u8]) -> Result<(), Status> {
        let mut tuple = [0; PROTECTION_BYTES];
        tuple.copy_from_slice(&metadata[self.place(metadata.len())]);
        let [g0, g1, a0, a1, r0, r1, r2, r3] = tuple;
        let (stored_guard, application) = (u16::from_be_bytes([g0, g1]), u16::from_be_bytes([a0, a1]));
        let reference = u32::from_be_bytes([r0, r1, r2, r3]);
        // These values disable all checks, whatever PRCHK says (NVM 5.2.3).
        if application == UNCHECKED_APPLICATION && (self.kind != 3 || reference == UNCHECKED_REFERENCE) {
            return Ok(());
        }
        if wanted.guard && stored_guard != self.guard_of(data, metadata) {
            return Err(Status::GUARD_CHECK_ERROR);
        }
        if wanted.application && (application ^ wanted.application_tag) & wanted.application_mask != 0 {
            return Err(Status::APPLICATION_TAG_CHECK_ERROR);
        }
        if wanted.reference && reference != self.reference_of(wanted, index) {
            return Err(Status::REFERENCE_TAG_CHECK_ERROR);
        }
        Ok(())
    }

    /// Puts the protection information of block `index` of a command into its metadata.
    pub fn insert(&self, wanted: &Wanted, index: u64, data: &[u8], metadata: &mut [u8]) {
        let place = self.place(metadata.len());
        let guard = self.guard_of(data, metadata).to_be_bytes();
        let application = wanted.application_tag.to_be_bytes();
        let reference = self.reference_of(wanted, index).to_be_bytes();
        let tuple = &mut metadata[place];
        tuple[..2].copy_from_slice(&guard);
        tuple[2..4].copy_from_slice(&application);
        tuple[4..].copy_from_slice(&reference);
    }

    /// From what an image stores to what it stands for, or back, in the metadata of several blocks: the complement, so that what was
    /// never written, or is a hole again, reads as all bytes FFh and is not checked (NVM 3.2.3.2.1, with DLFEAT bit 4 clear).
    pub fn complement(&self, metadata: &mut [u8], bytes: usize) {
        for block in metadata.chunks_exact_mut(bytes) {
            block[self.place(bytes)].iter_mut().for_each(|byte| *byte = !*byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [u8; 3] = [1, 2, 3];

    fn wanted(prinfo: u32) -> Wanted {
        Wanted::new(prinfo, 0x1234_5678, 0x00ff_abcd)
    }

    #[test]
    fn what_is_inserted_passes_every_check_and_nothing_else_does() {
        for (kind, first, bytes) in TYPES
            .into_iter()
            .flat_map(|kind| [(kind, true, 8), (kind, false, 8), (kind, true, 64), (kind, false, 64)])
        {
            let protection = Protection { kind, first };
            let data = [0x5a; 512];
            let mut metadata = vec![7; bytes];
            protection.insert(&wanted(0), 3, &data, &mut metadata);
            let all = wanted(7);
            assert_eq!(protection.check(&all, 3, &data, &metadata), Ok(()));
            let reference = protection.check(&all, 4, &data, &metadata);
            let counts = if kind == 3 { Ok(()) } else { Err(Status::REFERENCE_TAG_CHECK_ERROR) };
            assert_eq!(reference, counts, "type {kind}: the tag counts, or stays");
            let mut other = data;
            other[511] ^= 1;
            let spoiled = protection.check(&all, 3, &other, &metadata);
            assert_eq!(spoiled, Err(Status::GUARD_CHECK_ERROR));
            assert_eq!(protection.check(&wanted(3), 3, &other, &metadata), Ok(()), "not asked for");
            let masked = Wanted { application_tag: 0xffcd, ..all };
            assert_eq!(protection.check(&masked, 3, &data, &metadata), Ok(()), "only what the mask says");
            let foreign = Wanted { application_tag: 0xabcc, ..all };
            let refused = protection.check(&foreign, 3, &data, &metadata);
            assert_eq!(refused, Err(Status::APPLICATION_TAG_CHECK_ERROR));
            // The metadata in front of it are covered, those behind it are not.
            let at = if first { bytes - 1 } else { 0 };
            if bytes > 8 {
                metadata[at] ^= 1;
                let changed = protection.check(&all, 3, &data, &metadata);
                assert_eq!(changed, if first { Ok(()) } else { Err(Status::GUARD_CHECK_ERROR) });
            }
        }
    }

    #[test]
    fn an_escape_disables_all_checks() {
        for kind in TYPES {
            let protection = Protection { kind, first: true };
            let mut metadata = [0; 8];
            metadata[2..4].fill(0xff);
            let half = protection.check(&wanted(7), 0, &[1; 512], &metadata);
            assert_eq!(half.is_ok(), kind != 3, "type 3 wants the reference tag too");
            metadata[4..].fill(0xff);
            assert_eq!(protection.check(&wanted(7), 0, &[1; 512], &metadata), Ok(()));
        }
    }

    #[test]
    fn a_reference_tag_that_cannot_be_checked_is_refused() {
        let allowed = |kind, reference_tag, first| {
            let wanted = Wanted { reference_tag, ..wanted(1) };
            Protection { kind, first: false }.allows(&wanted, first).is_ok()
        };
        assert!(allowed(1, 5, 0x7_0000_0005) && !allowed(1, 6, 0x7_0000_0005));
        assert!(allowed(2, 6, 5) && !allowed(3, 5, 5));
        let guard_alone = Protection { kind: 3, first: false }.allows(&wanted(4), 0);
        assert_eq!(guard_alone, Ok(()));
    }

    #[test]
    fn a_block_that_was_never_written_stands_for_all_ones() {
        let protection = Protection { kind: 1, first: false };
        let mut metadata = [0; 32];
        protection.complement(&mut metadata, 16);
        let (zeroes, ones) = ([0; 8], [0xff; 8]);
        assert_eq!(metadata, [zeroes, ones, zeroes, ones].concat()[..]);
        protection.complement(&mut metadata, 16);
        assert_eq!(metadata, [0; 32]);
    }
}
