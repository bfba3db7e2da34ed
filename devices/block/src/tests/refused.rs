//! Processes that the kernel does not let use io_uring, and kernels that have too little of it: threads stand in.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use super::*;
use crate::Error;

/// From now on `call` of this thread, and of those that it starts, fails with `errno`.
fn refuse(call: libc::c_long, errno: i32) {
    let rules = BTreeMap::from([(call, Vec::new())]);
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), architecture);
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

/// What becomes of a context where `call` fails with `errno`.
fn context_without(call: libc::c_long, errno: i32) -> Result<IoContext, Error> {
    std::thread::spawn(move || {
        refuse(call, errno);
        IoContext::new(guest(), 4)
    })
    .join()
    .unwrap()
}

#[test]
fn threads_stand_in_where_io_uring_is_refused() {
    assert!(IoContext::new(guest(), 4).unwrap().has_ring(), "the reference host has io_uring");
    for (call, errno) in [
        // A filter, a switch, an old kernel; and one whose rings have no probes.
        (libc::SYS_io_uring_setup, libc::EPERM),
        (libc::SYS_io_uring_setup, libc::EACCES),
        (libc::SYS_io_uring_setup, libc::ENOSYS),
        (libc::SYS_io_uring_register, libc::EINVAL),
        (libc::SYS_io_uring_register, libc::EPERM),
    ] {
        let mut context = context_without(call, errno).unwrap();
        assert!(!context.has_ring(), "{call} fails with {errno}");
        let file = temporary_file(MIB);
        let image = FileImage::open(file.path(), FileOptions::default()).unwrap();
        let (memory, pattern) = ([range(0, 8192)], Numbers(7).bytes(8192));
        poke(context.memory(), &memory, &pattern);
        run(&mut context, &image, Operation::Write { fua: true }, 4096, 8192, &memory).unwrap();
        run(&mut context, &image, Operation::WriteZeroes { deallocate: true, fua: true }, 4096, 4096, &[])
            .unwrap();
        run(&mut context, &image, Operation::Flush, 0, 0, &[]).unwrap();
        run(&mut context, &image, Operation::Read, 4096, 8192, &memory).unwrap();
        let expected = [&[0; 4096], &pattern[4096..]].concat();
        assert!(peek(context.memory(), &memory) == expected, "{call} fails with {errno}");
    }
}

#[test]
fn other_failures_are_not_hidden_by_threads() {
    let error = context_without(libc::SYS_io_uring_setup, libc::ENOMEM).unwrap_err();
    assert_eq!(error.to_string(), "cannot set up io_uring");
}
