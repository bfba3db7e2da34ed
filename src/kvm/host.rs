//! The opened `/dev/kvm` and what this host's KVM can do.

use std::ffi::CString;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kvm_bindings as kvm;
use kvm_ioctls::{Cap, Kvm};

use super::Error;

/// What must be there, with the names of the kernel's documentation.
const REQUIRED: [(u32, &str); 18] = [
    (kvm::KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
    (kvm::KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"),
    (kvm::KVM_CAP_PIT2, "KVM_CAP_PIT2"),
    (kvm::KVM_CAP_PIT_STATE2, "KVM_CAP_PIT_STATE2"),
    (kvm::KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR"),
    (kvm::KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"),
    (kvm::KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
    (kvm::KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    (kvm::KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
    (kvm::KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
    (kvm::KVM_CAP_XCRS, "KVM_CAP_XCRS"),
    (kvm::KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK"),
    (kvm::KVM_CAP_IRQFD, "KVM_CAP_IRQFD"),
    (kvm::KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"),
    (kvm::KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING"),
    (kvm::KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
    (kvm::KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
    (kvm::KVM_CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ"),
];

/// What saved state depends on where it is there, besides what must be.
const STATE: [(u32, &str); 7] = [
    (kvm::KVM_CAP_INTR_SHADOW, "KVM_CAP_INTR_SHADOW"),
    (kvm::KVM_CAP_VCPU_ATTRIBUTES, "KVM_CAP_VCPU_ATTRIBUTES"),
    (kvm::KVM_CAP_TSC_DEADLINE_TIMER, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (kvm::KVM_CAP_KVMCLOCK_CTRL, "KVM_CAP_KVMCLOCK_CTRL"),
    (kvm::KVM_CAP_GET_MSR_FEATURES, "KVM_CAP_GET_MSR_FEATURES"),
    (kvm::KVM_CAP_XSAVE2, "KVM_CAP_XSAVE2"),
    (kvm::KVM_CAP_REINJECT_CONTROL, "KVM_CAP_REINJECT_CONTROL"),
];

/// The version of the KVM interface since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// KVM on this machine.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    paravirtual: bool,
}

impl Host {
    /// Opens `/dev/kvm` and checks that it can do what this VMM needs.
    ///
    /// # Errors
    /// One sentence that says what is wrong: [`Error::NoKvm`], [`Error::NoPermission`], [`Error::Open`],
    /// [`Error::ApiVersion`] or [`Error::MissingCapabilities`].
    pub fn open() -> Result<Self, Error> {
        Self::open_at(Path::new("/dev/kvm"))
    }

    /// As [`Self::open`], for a device of another name.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(path: &Path) -> Result<Self, Error> {
        #[cfg(test)]
        super::turn::take();
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::NoKvm(path.to_owned()))?;
        let fd = Kvm::open_with_cloexec_at(name, true).map_err(|source| match source.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTDIR => Error::NoKvm(path.to_owned()),
            libc::EACCES | libc::EPERM => Error::NoPermission(path.to_owned()),
            _ => Error::Open { path: path.to_owned(), source },
        })?;
        #[allow(unsafe_code)]
        // SAFETY: the descriptor was just opened and belongs to nobody else.
        let kvm = unsafe { Kvm::from_raw_fd(fd) };
        let found = kvm.get_api_version();
        if found != API_VERSION {
            return Err(Error::ApiVersion { path: path.to_owned(), found });
        }
        let missing: Vec<_> = REQUIRED
            .iter()
            .filter(|(capability, _)| kvm.check_extension_raw((*capability).into()) <= 0)
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(Error::MissingCapabilities { path: path.to_owned(), missing: missing.join(", ") });
        }
        let paravirtual = Path::new("/sys/module/kvm_pvm").exists();
        if paravirtual {
            log::info!(
                "KVM is kvm_pvm: guest code at CPL 0 is interpreted, and some CPUID features are hidden (no VMX or SVM)"
            );
        }
        Ok(Self { kvm, paravirtual })
    }

    /// Whether KVM works without VMX or SVM (module `kvm_pvm`), where CPUID needs masks.
    #[must_use]
    pub fn is_paravirtual(&self) -> bool {
        self.paravirtual
    }

    /// What saved state depends on here, by name, besides what every host must have.
    #[must_use]
    pub fn state_capabilities(&self) -> Vec<String> {
        let offered = STATE.iter().filter(|(number, _)| self.kvm.check_extension_raw((*number).into()) > 0);
        offered.map(|(_, name)| (*name).to_owned()).collect()
    }

    /// How many vCPUs a VM may have.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    /// Size in bytes of a vCPU's extended state, as `KVM_GET_XSAVE2` would write it.
    pub(crate) fn xsave_bytes(&self) -> usize {
        let size = self.kvm.check_extension_int(Cap::Xsave2);
        usize::try_from(size).unwrap_or(0).max(size_of::<kvm::kvm_xsave>())
    }

    pub(crate) fn fd(&self) -> &Kvm {
        &self.kvm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_kvm_is_explained_in_one_sentence() {
        let missing = Host::open_at(Path::new("/dev/no-such-kvm")).unwrap_err().to_string();
        assert!(
            missing.starts_with("/dev/no-such-kvm does not exist: this machine offers no KVM"),
            "{missing}"
        );
        let other = Host::open_at(Path::new("/dev/null")).unwrap_err().to_string();
        assert_eq!(other, "/dev/null speaks KVM API version -1, not 12: it is not a usable KVM");
    }

    #[test]
    fn this_host_has_a_usable_kvm() {
        let host = Host::open().expect("these tests need /dev/kvm");
        assert!(host.max_vcpus() >= 1);
        assert!(host.xsave_bytes() >= 4096);
    }
}
