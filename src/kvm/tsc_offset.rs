//! A vCPU's time stamp counter as an offset to the host's: a vCPU attribute since Linux 5.16, for which kvm-ioctls has no
//! function on x86.
#![allow(unsafe_code)]

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, ioctl_iow_nr};

use super::Error;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The guest's TSC minus the host's, modulo 2^64.
pub(crate) fn read(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    // SAFETY: the descriptor is a vCPU's; the kernel writes the 8 bytes of this attribute to `offset`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute(&raw mut offset)) };
    if result < 0 {
        return Err(Error::call("read the TSC offset (Linux 5.16 and later)")(errno::Error::last()));
    }
    Ok(offset)
}

/// Sets it; the guest's TSC jumps.
pub(crate) fn write(vcpu: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    // SAFETY: the descriptor is a vCPU's; the kernel reads the 8 bytes of this attribute from `offset`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute(&raw mut offset)) };
    if result < 0 {
        let what = format!("set the TSC offset to {offset:#x} (Linux 5.16 and later)");
        return Err(Error::call(what)(errno::Error::last()));
    }
    Ok(())
}

fn attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
    }
}
