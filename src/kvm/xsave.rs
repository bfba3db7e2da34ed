//! Extended processor state (`XSAVE`), whose size the host decides.
#![allow(unsafe_code)]

use kvm_bindings::{Xsave, kvm_xsave, kvm_xsave2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::fam::FamStruct;

use super::Error;

/// A vCPU's extended state as KVM lays it out: `bytes` long, at least 4096, a multiple of 4.
pub(crate) fn save(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, Error> {
    let mut xsave = room_for(bytes)?;
    // SAFETY: the state has room for `bytes`, which is what the kernel said it writes; this process enables no state
    // components dynamically, so the size does not grow.
    unsafe { vcpu.get_xsave2(&mut xsave) }
        .map_err(Error::call(format!("read {bytes} bytes of extended state")))?;
    let fixed = xsave.as_fam_struct_ref().xsave.region;
    let words = fixed.iter().chain(xsave.as_slice());
    let mut out: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    out.truncate(bytes);
    Ok(out)
}

/// Sets a vCPU's extended state. `bytes` is as long as [`save`] gives on this host; the caller checked.
pub(crate) fn restore(vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), Error> {
    let mut xsave = room_for(bytes.len())?;
    let mut words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    // SAFETY: the words are filled, the length stays.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    region.iter_mut().zip(&mut words).for_each(|(into, word)| *into = word);
    xsave.as_mut_slice().iter_mut().zip(words).for_each(|(into, word)| *into = word);
    // SAFETY: as for reading: the structure is as large as what the kernel reads.
    unsafe { vcpu.set_xsave2(&xsave) }
        .map_err(Error::call(format!("set {} bytes of extended state", bytes.len())))
}

fn room_for(bytes: usize) -> Result<Xsave, Error> {
    let words =
        bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>());
    Xsave::new(words).map_err(|e| Error::DeviceState {
        device: "vCPU",
        why: format!("extended state of {bytes} bytes cannot be held: {e:?}"),
    })
}
