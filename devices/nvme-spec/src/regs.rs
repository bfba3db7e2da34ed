//! Controller registers (Base 3.1.3) for the memory-based transport: offsets in BAR 0 and bit fields.

/// Controller Capabilities, 8 bytes (3.1.3.1).
pub const CAP: u64 = 0x00;
/// Version, 4 bytes (3.1.3.2).
pub const VS: u64 = 0x08;
/// Interrupt Mask Set, 4 bytes (3.1.3.3).
pub const INTMS: u64 = 0x0c;
/// Interrupt Mask Clear, 4 bytes (3.1.3.4).
pub const INTMC: u64 = 0x10;
/// Controller Configuration, 4 bytes (3.1.3.5).
pub const CC: u64 = 0x14;
/// Controller Status, 4 bytes (3.1.3.6).
pub const CSTS: u64 = 0x1c;
/// NVM Subsystem Reset, 4 bytes (3.1.3.7).
pub const NSSR: u64 = 0x20;
/// Admin Queue Attributes, 4 bytes (3.1.3.8).
pub const AQA: u64 = 0x24;
/// Admin Submission Queue Base Address, 8 bytes (3.1.3.9).
pub const ASQ: u64 = 0x28;
/// Admin Completion Queue Base Address, 8 bytes (3.1.3.10).
pub const ACQ: u64 = 0x30;
/// Controller Memory Buffer Location, 4 bytes (3.1.3.11).
pub const CMBLOC: u64 = 0x38;
/// Controller Memory Buffer Size, 4 bytes (3.1.3.12).
pub const CMBSZ: u64 = 0x3c;
/// Boot Partition Information, 4 bytes (3.1.3.13).
pub const BPINFO: u64 = 0x40;
/// Boot Partition Read Select, 4 bytes (3.1.3.14).
pub const BPRSEL: u64 = 0x44;
/// Boot Partition Memory Buffer Location, 8 bytes (3.1.3.15).
pub const BPMBL: u64 = 0x48;
/// Controller Memory Buffer Memory Space Control, 8 bytes (3.1.3.16).
pub const CMBMSC: u64 = 0x50;
/// Controller Memory Buffer Status, 4 bytes (3.1.3.17).
pub const CMBSTS: u64 = 0x58;
/// Controller Memory Buffer Elasticity Buffer Size, 4 bytes (3.1.3.18).
pub const CMBEBS: u64 = 0x5c;
/// Controller Memory Buffer Sustained Write Throughput, 4 bytes (3.1.3.19).
pub const CMBSWTP: u64 = 0x60;
/// NVM Subsystem Shutdown, 4 bytes (3.1.3.20).
pub const NSSD: u64 = 0x64;
/// Controller Ready Timeouts, 4 bytes (3.1.3.21).
pub const CRTO: u64 = 0x68;
/// Persistent Memory Region Capabilities, 4 bytes (3.1.3.22).
pub const PMRCAP: u64 = 0xe00;
/// Persistent Memory Region Control, 4 bytes (3.1.3.23).
pub const PMRCTL: u64 = 0xe04;
/// Persistent Memory Region Status, 4 bytes (3.1.3.24).
pub const PMRSTS: u64 = 0xe08;
/// Persistent Memory Region Elasticity Buffer Size, 4 bytes (3.1.3.25).
pub const PMREBS: u64 = 0xe0c;
/// Persistent Memory Region Sustained Write Throughput, 4 bytes (3.1.3.26).
pub const PMRSWTP: u64 = 0xe10;
/// Persistent Memory Region Memory Space Control, lower half, 4 bytes (3.1.3.27).
pub const PMRMSCL: u64 = 0xe14;
/// Persistent Memory Region Memory Space Control, upper half, 4 bytes (3.1.3.28).
pub const PMRMSCU: u64 = 0xe18;
/// First doorbell (NVMe over PCIe Transport 3.1.2): the tail of submission queue 0.
pub const DOORBELLS: u64 = 0x1000;

/// CMBMSC: Capabilities Registers Enabled.
pub const CMBMSC_CRE: u64 = 1 << 0;
/// CMBMSC: Controller Memory Space Enable.
pub const CMBMSC_CMSE: u64 = 1 << 1;
/// PMRCAP: Read Data Support.
pub const PMRCAP_RDS: u32 = 1 << 3;
/// PMRCAP: Write Data Support.
pub const PMRCAP_WDS: u32 = 1 << 4;
/// PMRCAP: where the Base Indicator Register begins.
pub const PMRCAP_BIR_SHIFT: u32 = 5;
/// PMRCAP: of the write barrier mechanisms, the completion of a read of PMRSTS.
pub const PMRCAP_PMRWBM_STATUS_READ: u32 = 1 << 11;
/// PMRCAP: where the Persistent Memory Region Timeout begins.
pub const PMRCAP_PMRTO_SHIFT: u32 = 16;
/// PMRCAP: Controller Memory Space Supported.
pub const PMRCAP_CMSS: u32 = 1 << 24;
/// PMRCTL: Enable.
pub const PMRCTL_EN: u32 = 1 << 0;
/// PMRSTS: Not Ready.
pub const PMRSTS_NRDY: u32 = 1 << 8;
/// PMRSTS: the Health Status Unreliable.
pub const PMRSTS_HSTS_UNRELIABLE: u32 = 0b011 << 9;
/// PMRSTS: Controller Base Address Invalid.
pub const PMRSTS_CBAI: u32 = 1 << 12;
/// PMRMSCL: Controller Memory Space Enable.
pub const PMRMSC_CMSE: u64 = 1 << 1;
/// The value written to NSSR that resets the subsystem: "NVMe" (3.1.3.7).
pub const NSSR_MAGIC: u32 = 0x4e56_4d65;
/// VS of a controller that follows Base 2.0.
pub const VERSION_2_0: u32 = 0x0002_0000;

/// Offset in BAR 0 of the tail doorbell of submission queue `queue` when CAP.DSTRD is 0.
#[must_use]
pub const fn sq_tail_doorbell(queue: u16) -> u64 {
    DOORBELLS + queue as u64 * 8
}

/// Offset in BAR 0 of the head doorbell of completion queue `queue` when CAP.DSTRD is 0.
#[must_use]
pub const fn cq_head_doorbell(queue: u16) -> u64 {
    DOORBELLS + queue as u64 * 8 + 4
}

/// Declares accessors for bit fields of a register: `name: type = low..=high`.
macro_rules! register {
    ($(#[$meta:meta])* pub struct $name:ident($raw:ty) {
        $($(#[$field_meta:meta])* $get:ident, $with:ident: $low:literal..=$high:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub $raw);

        impl $name {
            $(
                $(#[$field_meta])*
                #[must_use]
                pub const fn $get(self) -> $raw {
                    (self.0 >> $low) & ((1 << ($high - $low + 1)) - 1)
                }

                /// A copy with that field replaced; bits of `value` that do not fit are dropped.
                #[must_use]
                pub const fn $with(self, value: $raw) -> Self {
                    let mask: $raw = ((1 << ($high - $low + 1)) - 1) << $low;
                    Self((self.0 & !mask) | ((value << $low) & mask))
                }
            )*
        }
    };
}

register! {
    /// CAP.
    pub struct Cap(u64) {
        /// Maximum Queue Entries Supported, a 0's based value.
        mqes, with_mqes: 0..=15,
        /// Contiguous Queues Required.
        cqr, with_cqr: 16..=16,
        /// Arbitration Mechanism Supported: bit 0 weighted round robin with urgent.
        ams, with_ams: 17..=18,
        /// Timeout, the worst case for CSTS.RDY to change, in units of 500 ms.
        to, with_to: 24..=31,
        /// Doorbell Stride: 4 << DSTRD bytes.
        dstrd, with_dstrd: 32..=35,
        /// NVM Subsystem Reset Supported.
        nssrs, with_nssrs: 36..=36,
        /// Command Sets Supported: bit 0 NVM, bit 6 one or more I/O command sets, bit 7 none.
        css, with_css: 37..=44,
        /// Boot Partition Support.
        bps, with_bps: 45..=45,
        /// Controller Power Scope.
        cps, with_cps: 46..=47,
        /// Memory Page Size Minimum: 2 ^ (12 + MPSMIN) bytes.
        mpsmin, with_mpsmin: 48..=51,
        /// Memory Page Size Maximum: 2 ^ (12 + MPSMAX) bytes.
        mpsmax, with_mpsmax: 52..=55,
        /// Persistent Memory Region Supported.
        pmrs, with_pmrs: 56..=56,
        /// Controller Memory Buffer Supported.
        cmbs, with_cmbs: 57..=57,
        /// NVM Subsystem Shutdown Supported.
        nsss, with_nsss: 58..=58,
        /// Controller Ready Modes Supported: bit 0 ready with media, bit 1 ready independent of media.
        crms, with_crms: 59..=60,
    }
}

register! {
    /// CC.
    pub struct Cc(u32) {
        /// Enable.
        en, with_en: 0..=0,
        /// I/O Command Set Selected: 0 NVM, 6 all supported, 7 admin only.
        css, with_css: 4..=6,
        /// Memory Page Size: 2 ^ (12 + MPS) bytes.
        mps, with_mps: 7..=10,
        /// Arbitration Mechanism Selected: 0 round robin, 1 weighted round robin with urgent priority class.
        ams, with_ams: 11..=13,
        /// Shutdown Notification: 0 none, 1 normal, 2 abrupt.
        shn, with_shn: 14..=15,
        /// I/O Submission Queue Entry Size: 2 ^ n bytes.
        iosqes, with_iosqes: 16..=19,
        /// I/O Completion Queue Entry Size: 2 ^ n bytes.
        iocqes, with_iocqes: 20..=23,
        /// Controller Ready Independent of Media Enable.
        crime, with_crime: 24..=24,
    }
}

register! {
    /// CSTS.
    pub struct Csts(u32) {
        /// Ready.
        rdy, with_rdy: 0..=0,
        /// Controller Fatal Status.
        cfs, with_cfs: 1..=1,
        /// Shutdown Status: 0 normal operation, 1 in progress, 2 complete.
        shst, with_shst: 2..=3,
        /// NVM Subsystem Reset Occurred; cleared by writing 1.
        nssro, with_nssro: 4..=4,
        /// Processing Paused.
        pp, with_pp: 5..=5,
        /// Shutdown Type: 1 subsystem shutdown.
        st, with_st: 6..=6,
    }
}

register! {
    /// AQA.
    pub struct Aqa(u32) {
        /// Admin Submission Queue Size, 0's based.
        asqs, with_asqs: 0..=11,
        /// Admin Completion Queue Size, 0's based.
        acqs, with_acqs: 16..=27,
    }
}

/// CC.AMS: round robin.
pub const AMS_ROUND_ROBIN: u32 = 0;
/// CC.AMS: weighted round robin with urgent priority class.
pub const AMS_WEIGHTED: u32 = 1;
/// CC.CSS: the NVM command set.
pub const CSS_NVM: u32 = 0;
/// CC.CSS: all supported I/O command sets.
pub const CSS_ALL: u32 = 6;
/// CC.CSS: no I/O command set.
pub const CSS_ADMIN_ONLY: u32 = 7;
/// CC.SHN: normal shutdown.
pub const SHN_NORMAL: u32 = 1;
/// CC.SHN: abrupt shutdown.
pub const SHN_ABRUPT: u32 = 2;
/// CSTS.SHST: shutdown is being processed.
pub const SHST_IN_PROGRESS: u32 = 1;
/// CSTS.SHST: shutdown is complete.
pub const SHST_COMPLETE: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        assert_eq!(Cc::default().with_en(1).with_iosqes(6).with_iocqes(4).0, 0x0046_0001);
        assert_eq!(Cc(0x0046_4001).shn(), SHN_NORMAL);
        assert_eq!(Aqa::default().with_asqs(31).with_acqs(0xfff).0, 0x0fff_001f);
        assert_eq!(Cap::default().with_mqes(0xffff).with_css(0x41).0, 0x0000_0820_0000_ffff);
        assert_eq!(Cap::default().with_mpsmax(0x1f).0, 0x00f0_0000_0000_0000, "a value too large is cut");
        assert_eq!(sq_tail_doorbell(3), 0x1018);
        assert_eq!(cq_head_doorbell(3), 0x101c);
    }
}
