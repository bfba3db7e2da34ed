//! Room in the process's table of descriptors, made while that costs nothing.
//!
//! The kernel doubles the table whenever a number does not fit any more, and with several threads in the process whoever needs that
//! number waits until every processor has let go of the old table (an RCU grace period): 10 ms and more. The images of a guest with many
//! namespaces are opened while it stands still, between two processes, and the vectors of a controller while a restored guest waits.

use std::fs::File;
use std::io;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};

use crate::config::MachineSpec;

/// What a process has besides: of KVM, threads, channels, control clients, credentials.
const OTHERS: u64 = 256;

/// Makes room for all that the machine of `spec` will have open. Called while there is one thread.
pub fn make_room(spec: &MachineSpec) {
    let of_controllers = spec
        .controllers
        .iter()
        .map(|controller| u64::from(controller.vectors) + controller.namespaces.len() as u64);
    let count = OTHERS + u64::from(spec.cpus) + of_controllers.sum::<u64>();
    if let Err(error) = make_room_for(count) {
        // It works all the same, only not as fast.
        log::info!("no room for {count} descriptors ahead of time: {error}");
    }
}

/// The table is as large as its largest number has made it, and stays so.
fn make_room_for(count: u64) -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let last = i32::try_from(count.min(limit).saturating_sub(1)).map_err(io::Error::other)?;
    let any = File::open("/dev/null")?;
    Ok(fcntl_dupfd_cloexec(&any, last).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

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
