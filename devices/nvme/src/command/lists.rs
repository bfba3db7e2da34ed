//! Identify pages whose contents are the same everywhere: which UUIDs a command can select by, and what sizes suit a namespace.

use nvme_spec::identify::{self as spec, GranularityDescriptor, UuidEntry};
use nvme_spec::{IDENTIFY_SIZE_BYTES, Status, SubmissionEntry};

/// The UUIDs that a UUID Index can select, from index 1 on (Base 8.24). They tell apart definitions of what is specific to a vendor, of
/// which there is none here; the one that is listed stands for this project.
const UUIDS: [[u8; 16]; 1] =
    [[0x0f, 0x62, 0x3c, 0x1b, 0x9c, 0x4d, 0x4e, 0x0a, 0x8d, 0x57, 0x66, 0x65, 0x72, 0x72, 0x79, 0x01]];

/// What images are made of, whatever the size of a block: pages of a file system or of memory.
const GRANULARITY_BYTES: u64 = 4096;

/// Bits of CDW14 that hold a UUID Index.
const INDEX_MASK: u32 = 0x7f;

/// Refuses a UUID Index that is not in the list.
pub(crate) fn check_uuid_index(entry: &SubmissionEntry) -> Result<(), Status> {
    if (entry.cdw14 & INDEX_MASK) as usize > UUIDS.len() {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    Ok(())
}

/// UUID List (CNS 17h). A UUID of zeroes ends it.
pub(crate) fn uuids() -> [u8; IDENTIFY_SIZE_BYTES] {
    let mut page = spec::UuidList::default();
    for (place, uuid) in page.entries.iter_mut().zip(UUIDS) {
        *place = UuidEntry { header: spec::UUID_WITHOUT_ASSOCIATION, uuid };
    }
    page.to_bytes()
}

/// Namespace Granularity List (CNS 16h): one descriptor for all formats.
pub(crate) fn granularity() -> [u8; IDENTIFY_SIZE_BYTES] {
    let mut page = spec::NamespaceGranularityList::default();
    page.descriptors[0] =
        GranularityDescriptor { nsze_bytes: GRANULARITY_BYTES, ncap_bytes: GRANULARITY_BYTES };
    page.to_bytes()
}
