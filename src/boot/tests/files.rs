//! Files that lie, and what messages say of them.

use super::*;

/// Kernels of every kind, and what a run with 64 MiB makes of them.
fn try_kernel(image: &[u8]) -> Result<BootRegisters, Error> {
    load(&memory(64 * MIB), &spec(image))
}

/// Loading must not panic; whatever it accepts starts inside of memory.
fn survive(memory: &GuestMemory, image: &[u8]) -> bool {
    match load(memory, &spec(image)) {
        Ok(registers) => {
            assert!(memory.address_in_range(GuestAddress(registers.entry)));
            true
        }
        Err(_) => false,
    }
}

fn samples() -> [Vec<u8>; 3] {
    [elf(b"some code", 100, Some(0x20_0000)), elf(b"code", 0, None), bzimage(&[1; 600], |_| {})]
}

#[test]
fn cut_kernels_are_refused_or_harmless() {
    let memory = memory(64 * MIB);
    for image in samples() {
        let accepted = (0..image.len()).filter(|&length| survive(&memory, &image[..length])).count();
        assert!(survive(&memory, &image));
        // What may be missing at the end: notes, and compressed bytes that no header counts.
        assert!(accepted <= 601, "{accepted}");
    }
}

#[test]
fn changed_kernels_are_refused_or_harmless() {
    let memory = memory(64 * MIB);
    for image in samples() {
        for position in 0..image.len().min(0x290) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = image.clone();
                changed[position] = value;
                survive(&memory, &changed);
            }
        }
        // Whole fields, too.
        for position in (0..image.len().min(0x290)).step_by(4) {
            for value in [u64::MAX, u64::MAX - 7, 1 << 63, 1 << 32, 0xffff_f000] {
                let mut changed = image.clone();
                let end = image.len().min(position + 8);
                changed[position..end].copy_from_slice(&value.to_le_bytes()[..end - position]);
                survive(&memory, &changed);
            }
        }
    }
}

#[test]
fn kernels_that_reach_outside_of_memory_are_refused() {
    let too_large = elf(b"code", 64 * MIB, Some(0x20_0000));
    let error = try_kernel(&too_large).unwrap_err();
    assert!(matches!(error, Error::KernelOutside { what: "end", .. }), "{error}");
    let error = try_kernel(&elf(b"code", 0, Some(0x7000_0000))).unwrap_err();
    assert!(
        matches!(error, Error::KernelOutside { what: "entry point", address: 0x7000_0000, .. }),
        "{error}"
    );
    let mut elsewhere = elf(b"code", 0, None);
    elsewhere[64 + 24..64 + 32].copy_from_slice(&0x1_0000_0000_u64.to_le_bytes());
    let error = try_kernel(&elsewhere).unwrap_err();
    assert!(matches!(error, Error::LoadKernel { .. }), "{error}");
    let unpacked = bzimage(&[0; 600], |file| file[0x260..0x264].copy_from_slice(&[0xff; 4]));
    let error = try_kernel(&unpacked).unwrap_err();
    assert!(matches!(error, Error::KernelOutside { what: "end", .. }), "{error}");
}

#[test]
fn what_is_no_kernel_is_called_so() {
    for image in [&b""[..], b"#!/bin/sh\n", &[0; 4096], b"\x7fELX"] {
        let error = try_kernel(image).unwrap_err();
        assert_eq!(error.to_string(), "test kernel is neither an ELF vmlinux nor a bzImage");
    }
    let error = try_kernel(b"\x7fELF").unwrap_err();
    assert!(message(&error).contains("ELF"), "{}", message(&error));
    let old = bzimage(&[0; 600], |file| file[0x236] = 0);
    let error = try_kernel(&old).unwrap_err();
    assert!(error.to_string().contains("32-bit kernel"), "{error}");
}

#[test]
fn files_are_named_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let kernel = elf(b"code", 0, None);
    let memory = memory(64 * MIB);
    let as_kernel = BootSpec { kernel: Kernel::File(&missing), ..spec(&[]) };
    let as_initrd = BootSpec { initrd: Some(&missing), ..spec(&kernel) };
    for (spec, what) in [(as_kernel, "kernel"), (as_initrd, "initrd")] {
        let text = message(&load(&memory, &spec).unwrap_err());
        assert_eq!(
            text,
            format!("cannot open {what} {}: No such file or directory (os error 2)", missing.display())
        );
    }
    for path in [directory.path(), Path::new("/dev/zero")] {
        let as_kernel = BootSpec { kernel: Kernel::File(path), ..spec(&[]) };
        let as_initrd = BootSpec { initrd: Some(path), ..spec(&kernel) };
        for spec in [as_kernel, as_initrd] {
            let error = load(&memory, &spec).unwrap_err();
            assert!(matches!(error, Error::NotAFile { .. }), "{error}");
        }
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let memory = memory(16 * MIB);
    let kernel = elf(b"code", MIB, None);
    let initrd = tempfile::NamedTempFile::new().unwrap();
    let kernel_end = KERNEL + 4 + MIB;
    let room = (16 * MIB - kernel_end) / 4096 * 4096;
    let spec = BootSpec { initrd: Some(initrd.path()), ..spec(&kernel) };
    for (length, fits) in [(room, true), (room + 1, false), (1 << 40, false), (0, true)] {
        initrd.as_file().set_len(length).unwrap();
        match load(&memory, &spec) {
            Ok(_) => assert!(fits, "{length}"),
            Err(error) => {
                assert!(!fits && matches!(error, Error::InitrdSize { .. }), "{length}: {error}");
                assert!(error.to_string().contains(initrd.path().to_str().unwrap()), "{error}");
            }
        }
    }
}

#[test]
fn the_command_line_is_not_cut() {
    let memory = memory(64 * MIB);
    let kernel = elf(b"code", 0, None);
    let short = bzimage(&[0; 600], |file| file[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes()));
    let endless = bzimage(&[0; 600], |file| file[0x238..0x23c].copy_from_slice(&[0xff; 4]));
    for (image, maximum) in [(&kernel, 2047), (&short, 255), (&endless, 0x1_0000)] {
        let longest = "x".repeat(maximum);
        load(&memory, &BootSpec { cmdline: &longest, ..spec(image) }).unwrap();
        let longer = "x".repeat(maximum + 1);
        let error = load(&memory, &BootSpec { cmdline: &longer, ..spec(image) }).unwrap_err();
        assert!(matches!(error, Error::CommandLineLength { .. }), "{error}");
    }
    let error = load(&memory, &BootSpec { cmdline: "a\0b", ..spec(&kernel) }).unwrap_err();
    assert!(matches!(error, Error::CommandLineNul), "{error}");
}

#[test]
fn a_guest_without_low_memory_is_refused() {
    for memory in [memory(MIB - 4096), GuestMemory::from_ranges(&[(GuestAddress(MIB), 1 << 20)]).unwrap()] {
        let error = load(&memory, &spec(&elf(b"code", 0, None))).unwrap_err();
        assert!(matches!(error, Error::NoLowMemory), "{error}");
    }
}
