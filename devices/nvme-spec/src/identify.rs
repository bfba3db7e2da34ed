//! Identify data structures (Base 5.17, NVM 4.1.5).

/// Values of the Controller or Namespace Structure field (Base figure 273).
pub mod cns {
    /// Namespace of an NSID (NVM command set).
    pub const NAMESPACE: u8 = 0x00;
    /// Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active namespace identifiers.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// Namespace identification descriptors.
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    /// NVM sets.
    pub const NVM_SETS: u8 = 0x04;
    /// Command-set specific namespace.
    pub const CSI_NAMESPACE: u8 = 0x05;
    /// Command-set specific controller.
    pub const CSI_CONTROLLER: u8 = 0x06;
    /// Active namespace identifiers of a command set.
    pub const CSI_ACTIVE_NAMESPACES: u8 = 0x07;
    /// Namespace, independent of the command set.
    pub const INDEPENDENT_NAMESPACE: u8 = 0x08;
    /// Namespace for a user data format.
    pub const FORMAT_NAMESPACE: u8 = 0x09;
    /// Command-set specific namespace for a user data format.
    pub const CSI_FORMAT_NAMESPACE: u8 = 0x0a;
    /// Allocated namespace identifiers.
    pub const ALLOCATED_NAMESPACES: u8 = 0x10;
    /// Namespace of an allocated NSID.
    pub const ALLOCATED_NAMESPACE: u8 = 0x11;
    /// Controllers a namespace is attached to.
    pub const ATTACHED_CONTROLLERS: u8 = 0x12;
    /// Controllers of the subsystem.
    pub const CONTROLLERS: u8 = 0x13;
    /// Primary controller capabilities.
    pub const PRIMARY_CONTROLLER: u8 = 0x14;
    /// Secondary controllers.
    pub const SECONDARY_CONTROLLERS: u8 = 0x15;
    /// Namespace granularity.
    pub const NAMESPACE_GRANULARITY: u8 = 0x16;
    /// UUID list.
    pub const UUIDS: u8 = 0x17;
    /// Allocated namespace identifiers of a command set.
    pub const CSI_ALLOCATED_NAMESPACES: u8 = 0x1a;
    /// Command-set specific namespace of an allocated NSID.
    pub const CSI_ALLOCATED_NAMESPACE: u8 = 0x1b;
    /// Combinations of I/O command sets.
    pub const COMMAND_SETS: u8 = 0x1c;
}

/// Command Set Identifier of the NVM command set.
pub const CSI_NVM: u8 = 0x00;

wire_struct! {
    /// A power state descriptor (Base figure 276).
    pub struct PowerState [32] {
        /// Maximum Power in the unit that bit 0 of `flags` chooses (0: 0.01 W).
        0: maximum_power: u16,
        /// Bit 0 Max Power Scale, bit 1 Non-Operational State.
        3: flags: u8,
        /// Entry latency in microseconds.
        4: entry_latency_us: u32,
        /// Exit latency in microseconds.
        8: exit_latency_us: u32,
    }
}

wire_struct! {
    /// CNS 01h, Identify Controller (Base figure 275; bytes 512 and above partly NVM figure 100).
    pub struct IdentifyController [4096] {
        /// PCI Vendor ID.
        0: vid: u16,
        /// PCI Subsystem Vendor ID.
        2: ssvid: u16,
        /// Serial Number, ASCII, padded with spaces.
        4: sn: [u8; 20],
        /// Model Number, ASCII, padded with spaces.
        24: mn: [u8; 40],
        /// Firmware Revision, ASCII, padded with spaces.
        64: fr: [u8; 8],
        /// Recommended Arbitration Burst, a power of two.
        72: rab: u8,
        /// IEEE OUI Identifier.
        73: ieee: [u8; 3],
        /// Controller Multi-Path I/O and Namespace Sharing Capabilities.
        76: cmic: u8,
        /// Maximum Data Transfer Size: 2 ^ n pages of CAP.MPSMIN; 0 means no limit.
        77: mdts: u8,
        /// Controller ID.
        78: cntlid: u16,
        /// Version, as in VS.
        80: ver: u32,
        /// RTD3 Resume Latency in microseconds.
        84: rtd3r: u32,
        /// RTD3 Entry Latency in microseconds.
        88: rtd3e: u32,
        /// Optional Asynchronous Events Supported.
        92: oaes: u32,
        /// Controller Attributes.
        96: ctratt: u32,
        /// Read Recovery Levels Supported.
        100: rrls: u16,
        /// Controller Type: 1 I/O controller.
        111: cntrltype: u8,
        /// FRU Globally Unique Identifier.
        112: fguid: [u8; 16],
        /// Command Retry Delay Times 1 to 3 in units of 100 ms.
        128: crdt: [u16; 3],
        /// Optional Admin Command Support.
        256: oacs: u16,
        /// Abort Command Limit, 0's based.
        258: acl: u8,
        /// Asynchronous Event Request Limit, 0's based.
        259: aerl: u8,
        /// Firmware Updates.
        260: frmw: u8,
        /// Log Page Attributes.
        261: lpa: u8,
        /// Error Log Page Entries, 0's based.
        262: elpe: u8,
        /// Number of Power States Support, 0's based.
        263: npss: u8,
        /// Admin Vendor Specific Command Configuration.
        264: avscc: u8,
        /// Autonomous Power State Transition Attributes.
        265: apsta: u8,
        /// Warning Composite Temperature Threshold in kelvins.
        266: wctemp: u16,
        /// Critical Composite Temperature Threshold in kelvins.
        268: cctemp: u16,
        /// Maximum Time for Firmware Activation in units of 100 ms.
        270: mtfa: u16,
        /// Host Memory Buffer Preferred Size.
        272: hmpre: u32,
        /// Host Memory Buffer Minimum Size.
        276: hmmin: u32,
        /// Total NVM Capacity in bytes.
        280: tnvmcap: u128,
        /// Unallocated NVM Capacity in bytes.
        296: unvmcap: u128,
        /// Extended Device Self-test Time in minutes.
        316: edstt: u16,
        /// Device Self-test Options: bit 0 one at a time in the subsystem.
        318: dsto: u8,
        /// Firmware Update Granularity in units of 4 KiB, FFh none.
        319: fwug: u8,
        /// Keep Alive Support: granularity in units of 100 ms.
        320: kas: u16,
        /// Sanitize Capabilities.
        328: sanicap: u32,
        /// ANA Transition Time in seconds.
        342: anatt: u8,
        /// Asymmetric Namespace Access Capabilities.
        343: anacap: u8,
        /// ANA Group Identifier Maximum.
        344: anagrpmax: u32,
        /// Number of ANA Group Identifiers.
        348: nanagrpid: u32,
        /// Persistent Event Log Size: the most it can have, in units of 64 KiB.
        352: pels: u32,
        /// Submission Queue Entry Size: bits 3:0 required, 7:4 maximum, powers of two.
        512: sqes: u8,
        /// Completion Queue Entry Size: bits 3:0 required, 7:4 maximum, powers of two.
        513: cqes: u8,
        /// Maximum Outstanding Commands.
        514: maxcmd: u16,
        /// Number of Namespaces: the largest NSID that can exist.
        516: nn: u32,
        /// Optional NVM Command Support.
        520: oncs: u16,
        /// Fused Operation Support.
        522: fuses: u16,
        /// Format NVM Attributes.
        524: fna: u8,
        /// Volatile Write Cache.
        525: vwc: u8,
        /// Atomic Write Unit Normal in blocks, 0's based.
        526: awun: u16,
        /// Atomic Write Unit Power Fail in blocks, 0's based.
        528: awupf: u16,
        /// I/O Command Set Vendor Specific Command Configuration.
        530: icsvscc: u8,
        /// Namespace Write Protection Capabilities.
        531: nwpc: u8,
        /// Atomic Compare and Write Unit in blocks, 0's based.
        532: acwu: u16,
        /// Copy Descriptor Formats Supported.
        534: cdfs: u16,
        /// SGL Support.
        536: sgls: u32,
        /// Maximum Number of Allowed Namespaces.
        540: mnan: u32,
        /// NVM Subsystem NVMe Qualified Name, UTF-8, NUL terminated.
        768: subnqn: [u8; 256],
        /// Power State Descriptors.
        2048: psd: [PowerState; 32],
    }
}

/// OAES and Asynchronous Event Configuration bit 8: Namespace Attribute Notices.
pub const OAES_NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
/// OAES and Asynchronous Event Configuration bit 9: Firmware Activation Notices.
pub const OAES_FIRMWARE_ACTIVATION: u32 = 1 << 9;
/// OAES and Asynchronous Event Configuration bit 11: Asymmetric Namespace Access Change Notices.
pub const OAES_ACCESS_CHANGE: u32 = 1 << 11;
/// CMIC bit 1: the subsystem may have several controllers.
pub const CMIC_CONTROLLERS: u8 = 1 << 1;
/// CMIC bit 3: asymmetric namespace access is reported.
pub const CMIC_ACCESS: u8 = 1 << 3;
/// NMIC bit 0: the namespace may be attached to several controllers.
pub const NMIC_SHARED: u8 = 1 << 0;
/// ANACAP bits 4:0: every state can be reported.
pub const ANACAP_ALL_STATES: u8 = 0x1f;
/// ANACAP bit 6: a namespace stays in its group as long as it is attached.
pub const ANACAP_FIXED_GROUPS: u8 = 1 << 6;
/// CTRATT bit 0: 128-bit Host Identifier.
pub const CTRATT_HOST_IDENTIFIER_128: u32 = 1 << 0;
/// CTRATT bit 7: Namespace Granularity.
pub const CTRATT_NAMESPACE_GRANULARITY: u32 = 1 << 7;
/// CTRATT bit 9: UUID List.
pub const CTRATT_UUID_LIST: u32 = 1 << 9;
/// OACS bit 1: Format NVM.
pub const OACS_FORMAT: u16 = 1 << 1;
/// OACS bit 2: Firmware Commit and Firmware Image Download.
pub const OACS_FIRMWARE: u16 = 1 << 2;
/// OACS bit 4: Device Self-test.
pub const OACS_SELF_TEST: u16 = 1 << 4;
/// OACS bit 3: Namespace Management and Namespace Attachment.
pub const OACS_NAMESPACE_MANAGEMENT: u16 = 1 << 3;
/// OACS bit 8: Doorbell Buffer Config.
pub const OACS_DOORBELL_BUFFER_CONFIG: u16 = 1 << 8;
/// LPA bit 0: SMART log per namespace.
pub const LPA_SMART_PER_NAMESPACE: u8 = 1 << 0;
/// LPA bit 1: Commands Supported and Effects log.
pub const LPA_COMMANDS_SUPPORTED: u8 = 1 << 1;
/// LPA bit 2: extended data (offsets and 32-bit lengths) for Get Log Page.
pub const LPA_EXTENDED_DATA: u8 = 1 << 2;
/// LPA bit 4: Persistent Event log.
pub const LPA_PERSISTENT_EVENT: u8 = 1 << 4;
/// LPA bit 5: Supported Log Pages, Feature Identifiers Supported and Effects logs.
pub const LPA_SUPPORTED_PAGES: u8 = 1 << 5;
/// FRMW bit 0: slot 1 is read-only.
pub const FRMW_FIRST_SLOT_READ_ONLY: u8 = 1 << 0;
/// FRMW bit 4: firmware is activated without a reset if asked for.
pub const FRMW_ACTIVATION_WITHOUT_RESET: u8 = 1 << 4;
/// SANICAP bit 1: Block Erase.
pub const SANICAP_BLOCK_ERASE: u32 = 1 << 1;
/// SANICAP bit 2: Overwrite.
pub const SANICAP_OVERWRITE: u32 = 1 << 2;
/// SANICAP bits 31:30 = 01b: media is not modified after a sanitize that was not to deallocate.
pub const SANICAP_MEDIA_NOT_MODIFIED_AFTERWARDS: u32 = 1 << 30;
/// NWPC bit 0: namespaces can be write protected.
pub const NWPC_WRITE_PROTECT: u8 = 1 << 0;
/// NWPC bit 1: until a power cycle.
pub const NWPC_UNTIL_POWER_CYCLE: u8 = 1 << 1;
/// NWPC bit 2: for ever.
pub const NWPC_PERMANENT: u8 = 1 << 2;
/// FPI bit 7: the progress of a format is reported in the other bits, as percents that remain.
pub const FPI_SUPPORTED: u8 = 1 << 7;
/// ONCS bit 0: Compare.
pub const ONCS_COMPARE: u16 = 1 << 0;
/// ONCS bit 1: Write Uncorrectable.
pub const ONCS_WRITE_UNCORRECTABLE: u16 = 1 << 1;
/// ONCS bit 2: Dataset Management.
pub const ONCS_DATASET_MANAGEMENT: u16 = 1 << 2;
/// ONCS bit 3: Write Zeroes.
pub const ONCS_WRITE_ZEROES: u16 = 1 << 3;
/// ONCS bit 4: saving of features, the Save field of Set Features and the Select field of Get Features.
pub const ONCS_FEATURE_SELECT: u16 = 1 << 4;
/// ONCS bit 5: reservations.
pub const ONCS_RESERVATIONS: u16 = 1 << 5;
/// RESCAP bits 6:1: every type of reservation.
pub const RESCAP_ALL_TYPES: u8 = 0x3f << 1;
/// RESCAP bit 7: Ignore Existing Key is as of revision 1.3 and later.
pub const RESCAP_IGNORE_EXISTING_KEY: u8 = 1 << 7;
/// RESCAP bit 0: reservations and registrations can persist through power loss.
pub const RESCAP_PERSIST: u8 = 1 << 0;
/// ONCS bit 6: Timestamp feature.
pub const ONCS_TIMESTAMP: u16 = 1 << 6;
/// ONCS bit 7: Verify.
pub const ONCS_VERIFY: u16 = 1 << 7;
/// ONCS bit 8: Copy.
pub const ONCS_COPY: u16 = 1 << 8;
/// FUSES bit 0: fused Compare and Write.
pub const FUSES_COMPARE_AND_WRITE: u16 = 1 << 0;
/// CDFS bit 0: Copy Descriptor Format 0h.
pub const CDFS_FORMAT_0: u16 = 1 << 0;
/// CDFS bit 1: Copy Descriptor Format 1h.
pub const CDFS_FORMAT_1: u16 = 1 << 1;
/// SGLS bits 1:0 = 1: SGLs, of data at any alignment and of any length.
pub const SGLS_BYTES: u32 = 1;
/// SGLS bit 16: bit buckets.
pub const SGLS_BIT_BUCKET: u32 = 1 << 16;
/// SGLS bit 17: MPTR may be a byte aligned buffer (PSDT 01b).
pub const SGLS_METADATA_BUFFER: u32 = 1 << 17;
/// SGLS bit 18: an SGL may be longer than the data.
pub const SGLS_LONGER: u32 = 1 << 18;
/// SGLS bit 19: MPTR may be the address of a descriptor (PSDT 10b).
pub const SGLS_METADATA_DESCRIPTOR: u32 = 1 << 19;
/// VWC bit 0: a volatile write cache is present.
pub const VWC_PRESENT: u8 = 1 << 0;
/// VWC bits 2:1: Flush accepts the broadcast NSID.
pub const VWC_BROADCAST_FLUSH: u8 = 3 << 1;

wire_struct! {
    /// An LBA format (NVM figure 98).
    pub struct LbaFormat [4] {
        /// Metadata Size in bytes.
        0: metadata_bytes: u16,
        /// LBA Data Size: 2 ^ n bytes.
        2: lba_data_size_log2: u8,
        /// Relative Performance: 0 best.
        3: relative_performance: u8,
    }
}

wire_struct! {
    /// CNS 00h, Identify Namespace of the NVM command set (NVM figure 97).
    pub struct IdentifyNamespace [4096] {
        /// Namespace Size in blocks.
        0: nsze: u64,
        /// Namespace Capacity in blocks.
        8: ncap: u64,
        /// Namespace Utilization in blocks.
        16: nuse: u64,
        /// Namespace Features.
        24: nsfeat: u8,
        /// Number of LBA Formats, 0's based.
        25: nlbaf: u8,
        /// Formatted LBA Size: bits 3:0 the format.
        26: flbas: u8,
        /// Metadata Capabilities.
        27: mc: u8,
        /// End-to-end Data Protection Capabilities.
        28: dpc: u8,
        /// End-to-end Data Protection Type Settings.
        29: dps: u8,
        /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
        30: nmic: u8,
        /// Reservation Capabilities.
        31: rescap: u8,
        /// Format Progress Indicator.
        32: fpi: u8,
        /// Deallocate Logical Block Features.
        33: dlfeat: u8,
        /// Namespace Atomic Write Unit Normal, 0's based.
        34: nawun: u16,
        /// Namespace Atomic Write Unit Power Fail, 0's based.
        36: nawupf: u16,
        /// Namespace Atomic Compare and Write Unit, 0's based.
        38: nacwu: u16,
        /// Namespace Optimal I/O Boundary in blocks.
        46: noiob: u16,
        /// NVM Capacity in bytes.
        48: nvmcap: u128,
        /// Namespace Preferred Write Granularity, 0's based.
        64: npwg: u16,
        /// Namespace Preferred Write Alignment, 0's based.
        66: npwa: u16,
        /// Namespace Preferred Deallocate Granularity, 0's based.
        68: npdg: u16,
        /// Namespace Preferred Deallocate Alignment, 0's based.
        70: npda: u16,
        /// Namespace Optimal Write Size, 0's based.
        72: nows: u16,
        /// Maximum Single Source Range Length of Copy.
        74: mssrl: u16,
        /// Maximum Copy Length.
        76: mcl: u32,
        /// Maximum Source Range Count, 0's based.
        80: msrc: u8,
        /// ANA Group Identifier.
        92: anagrpid: u32,
        /// Namespace Attributes: bit 0 write protected.
        99: nsattr: u8,
        /// NVM Set Identifier.
        100: nvmsetid: u16,
        /// Endurance Group Identifier.
        102: endgid: u16,
        /// Namespace Globally Unique Identifier.
        104: nguid: [u8; 16],
        /// IEEE Extended Unique Identifier.
        120: eui64: [u8; 8],
        /// LBA formats.
        128: lbaf: [LbaFormat; 64],
    }
}

/// MC bit 0: metadata at the end of each block.
pub const MC_EXTENDED: u8 = 1 << 0;
/// MC bit 1: metadata in a buffer of their own.
pub const MC_SEPARATE: u8 = 1 << 1;
/// DPC bits 2:0: protection information of types 1 to 3.
pub const DPC_ALL_TYPES: u8 = 0b111;
/// DPC bit 3: in the first eight bytes of the metadata.
pub const DPC_FIRST_BYTES: u8 = 1 << 3;
/// DPC bit 4: in the last eight bytes of the metadata.
pub const DPC_LAST_BYTES: u8 = 1 << 4;
/// NSFEAT bit 2: deallocated blocks may be read without an error when the error recovery feature does not forbid it.
pub const NSFEAT_DEALLOCATED_ERROR: u8 = 1 << 2;
/// NSFEAT bit 4: NPWG, NPWA, NPDG, NPDA and NOWS are valid.
pub const NSFEAT_OPTIMAL_PERFORMANCE: u8 = 1 << 4;
/// DLFEAT bits 2:0 = 1: deallocated blocks read as zeroes.
pub const DLFEAT_READS_ZERO: u8 = 1;
/// DLFEAT bit 3: Write Zeroes honours its Deallocate bit.
pub const DLFEAT_WRITE_ZEROES_DEALLOCATE: u8 = 1 << 3;
/// NSATTR bit 0: currently write protected.
pub const NSATTR_WRITE_PROTECTED: u8 = 1 << 0;

/// Namespace identification descriptor types of CNS 03h (Base figure 277).
pub mod descriptor {
    /// IEEE EUI-64, 8 bytes.
    pub const EUI64: u8 = 1;
    /// NGUID, 16 bytes.
    pub const NGUID: u8 = 2;
    /// UUID, 16 bytes.
    pub const UUID: u8 = 3;
    /// Command Set Identifier, 1 byte.
    pub const CSI: u8 = 4;
}

wire_struct! {
    /// CNS 06h for the NVM command set (NVM figure 102).
    pub struct IdentifyNvmController [4096] {
        /// Verify Size Limit: 2 ^ n pages of CAP.MPSMIN, 0 none.
        0: vsl: u8,
        /// Write Zeroes Size Limit, likewise.
        1: wzsl: u8,
        /// Write Uncorrectable Size Limit, likewise.
        2: wusl: u8,
        /// Dataset Management Ranges Limit, 0 none.
        3: dmrl: u8,
        /// Dataset Management Range Size Limit in blocks, 0 none.
        4: dmrsl: u32,
        /// Dataset Management Size Limit in blocks, 0 none.
        8: dmsl: u64,
    }
}

wire_struct! {
    /// CNS 08h, I/O command set independent namespace (Base figure 280).
    pub struct IdentifyIndependentNamespace [4096] {
        /// Common Namespace Features.
        0: nsfeat: u8,
        /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
        1: nmic: u8,
        /// Reservation Capabilities.
        2: rescap: u8,
        /// Format Progress Indicator.
        3: fpi: u8,
        /// ANA Group Identifier.
        4: anagrpid: u32,
        /// Namespace Attributes.
        8: nsattr: u8,
        /// NVM Set Identifier.
        10: nvmsetid: u16,
        /// Endurance Group Identifier.
        12: endgid: u16,
        /// Namespace Status: bit 0 ready.
        14: nstat: u8,
    }
}

wire_struct! {
    /// An entry of the UUID List (Base figure 292).
    pub struct UuidEntry [32] {
        /// Bits 1:0 Identifier Association.
        0: header: u8,
        /// UUID, as in RFC 4122.
        16: uuid: [u8; 16],
    }
}

/// Identifier Association 00b: of no one whom the controller names elsewhere.
pub const UUID_WITHOUT_ASSOCIATION: u8 = 0;

wire_struct! {
    /// CNS 17h, UUID List (Base figure 291): UUID 1 is the one that index 1 selects.
    pub struct UuidList [4096] {
        /// Entries; one without a UUID ends them.
        32: entries: [UuidEntry; 127],
    }
}

wire_struct! {
    /// Sizes that suit a namespace (Base figure 290).
    pub struct GranularityDescriptor [16] {
        /// Namespace Size Granularity, 0 none.
        0: nsze_bytes: u64,
        /// Namespace Capacity Granularity, 0 none.
        8: ncap_bytes: u64,
    }
}

wire_struct! {
    /// CNS 16h, Namespace Granularity List (Base figure 289).
    pub struct NamespaceGranularityList [4096] {
        /// Bit 0: there is a descriptor for each LBA format; otherwise the first one is for all.
        0: attributes: u32,
        /// Number of Descriptors, 0's based.
        4: descriptor_count: u8,
        /// Descriptors.
        32: descriptors: [GranularityDescriptor; 16],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_keep_what_is_put_in() {
        let controller = IdentifyController {
            sn: *b"SERIAL              ",
            nn: 1024,
            subnqn: [b'x'; 256],
            psd: [PowerState { maximum_power: 7, ..PowerState::default() }; 32],
            ..IdentifyController::default()
        };
        let bytes = controller.to_bytes();
        assert_eq!(IdentifyController::from_bytes(&bytes), controller);
        assert_eq!(&bytes[4..10], b"SERIAL");
        assert_eq!(bytes[516..520], 1024u32.to_le_bytes());
        assert_eq!((bytes[2048], bytes[2048 + 31 * 32]), (7, 7));
        let mut namespace = IdentifyNamespace { nsze: 9, ..IdentifyNamespace::default() };
        namespace.lbaf[1].lba_data_size_log2 = 12;
        let bytes = namespace.to_bytes();
        assert_eq!((bytes[0], bytes[134]), (9, 12));
        assert_eq!(IdentifyNamespace::from_bytes(&bytes), namespace);
    }
}
