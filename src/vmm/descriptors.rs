//! Room in the process's table of descriptors, made while that costs nothing.
//!
//! The kernel doubles the table whenever a number does not fit any more, and with several threads in the process whoever needs that
//! number waits until every processor has let go of the old table (an RCU grace period): 10 ms and more. The images of a guest with many
//! namespaces are opened while it stands still, between two processes, and its memory comes from one to the other then; the vectors of
//! a controller are made while a restored guest waits.

use std::fs::File;
use std::io;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};

use crate::config::{BackendSpec, MachineSpec};

/// What a process has besides: of KVM, threads, channels, control clients, credentials.
const OTHERS: u64 = 256;

/// Of a block of memory: our own, and those by which another process has passed it, one to read and one to write.
const OF_MEMORY: u64 = 3;
/// Of a file of an image: the one that is held, and one by which another process has passed it, or is to get it.
const OF_FILE: u64 = 2;

fn of_namespace(backend: &BackendSpec) -> u64 {
    match backend {
        BackendSpec::File(_) | BackendSpec::Qcow2(_) => OF_FILE,
        BackendSpec::Overlay { .. } => 2 * OF_FILE,
        BackendSpec::Memory { .. } => OF_MEMORY,
        BackendSpec::Null { .. } => 0,
    }
}

/// What the machine of `spec` will have open at most.
fn needed(spec: &MachineSpec) -> u64 {
    let of_controllers = spec.controllers.iter().map(|controller| {
        let namespaces = controller.namespaces.iter().map(|namespace| of_namespace(&namespace.backend));
        let memory =
            [controller.buffer_bytes, controller.region_bytes].into_iter().filter(|bytes| *bytes > 0);
        u64::from(controller.vectors) + namespaces.sum::<u64>() + OF_MEMORY * memory.count() as u64
    });
    OTHERS + u64::from(spec.cpus) + of_controllers.sum::<u64>()
}

fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Whether the process may have all of that.
#[must_use]
pub fn has_room(spec: &MachineSpec) -> bool {
    needed(spec) <= limit()
}

/// Makes room for all that the machine of `spec` will have open. Called while there is one thread.
pub fn make_room(spec: &MachineSpec) {
    let count = needed(spec);
    if let Err(error) = make_room_for(count) {
        // It works all the same, only not as fast.
        log::info!("no room for {count} descriptors ahead of time: {error}");
    }
}

/// The table is as large as its largest number has made it, and stays so.
fn make_room_for(count: u64) -> io::Result<()> {
    let last = i32::try_from(count.min(limit()).saturating_sub(1)).map_err(io::Error::other)?;
    let any = File::open("/dev/null")?;
    Ok(fcntl_dupfd_cloexec(&any, last).map(drop)?)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Arguments, Command};

    fn needed_with(flags: &[&str]) -> u64 {
        let line = ["ferry", "run", "--kernel", "none", "--nvme", "serial=a,queues=1"].iter().chain(flags);
        let Command::Run(arguments) = Arguments::parse_from(line).command else { panic!("it is run") };
        needed(&arguments.machine().unwrap())
    }

    #[test]
    fn what_comes_in_a_hand_over_has_room_beside_what_is_held() {
        let more = |flags: &[&str]| needed_with(flags) - needed_with(&[]);
        for (namespace, count) in [
            ("backend=file,path=a", OF_FILE),
            ("backend=qcow2,path=a", OF_FILE),
            ("backend=qcow2,path=a,base=b", 2 * OF_FILE),
            ("backend=memory,size=1M", OF_MEMORY),
            ("backend=null,size=1M", 0),
        ] {
            assert_eq!(more(&["--ns", &format!("controller=a,nsid=1,{namespace}")]), count, "{namespace}");
        }
        let plain = more(&["--nvme", "serial=b,queues=1"]);
        assert_eq!(more(&["--nvme", "serial=b,queues=1,cmb=1M"]), plain + OF_MEMORY);
    }

    /// How many descriptors the table has room for.
    fn room() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        line.unwrap().trim().parse().unwrap()
    }

    /// One test: the table is the process's.
    #[test]
    fn the_table_is_as_large_as_was_asked_for_and_as_the_process_may_have() {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(4096);
        let more = (room() + 1).min(limit);
        make_room_for(more).unwrap();
        assert!(room() >= more, "{} of {more}", room());
        make_room_for(limit + 1).unwrap();
        assert!(room() >= limit, "{} of {limit}", room());
    }
}
