//! The host that figures hold for.

use std::fmt;
use std::path::Path;

use serde::Serialize;

/// What a figure depends on besides the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Processors that this process may use.
    pub cores: usize,
    /// Their name.
    pub processor: String,
    /// The kernel's release.
    pub kernel: String,
    /// KVM's module.
    pub module: String,
    /// It is a virtual machine that gives free memory back to its hypervisor, for whose sake it can lose pages that are in use for moments
    /// too: each is then had back at its next touch, which takes many times as long.
    pub lends_memory: bool,
}

/// Where the devices of the memory balloon are.
const BALLOONS: &str = "/sys/bus/virtio/drivers/virtio_balloon";
/// Which feature says that free pages are reported (Virtual I/O Device 1.2, 5.5.3: `VIRTIO_BALLOON_F_PAGE_REPORTING`).
const PAGE_REPORTING: usize = 5;

impl Host {
    /// This host; what it does not tell is `unknown`.
    #[must_use]
    pub fn this() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"];
        let module = modules.into_iter().find(|name| Path::new("/sys/module").join(name).exists());
        Self {
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            processor: processor(&read("/proc/cpuinfo")).unwrap_or("unknown").to_owned(),
            kernel: match read("/proc/sys/kernel/osrelease").trim() {
                "" => "unknown".to_owned(),
                release => release.to_owned(),
            },
            module: module.unwrap_or("unknown").to_owned(),
            lends_memory: lends_memory(Path::new(BALLOONS)),
        }
    }
}

/// Whether one of the devices in `balloons` has agreed to it.
fn lends_memory(balloons: &Path) -> bool {
    let devices = std::fs::read_dir(balloons).into_iter().flatten().flatten();
    // A digit for each feature, the first for number 0.
    let features = devices.filter_map(|device| std::fs::read(device.path().join("features")).ok());
    features.into_iter().any(|digits| digits.get(PAGE_REPORTING) == Some(&b'1'))
}

/// Bytes of memory that new processes can have without others losing theirs, if the host tells.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    available(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

fn processor(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim())
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cores, processor, kernel, module, lends_memory } = self;
        write!(f, "{cores} cores of {processor}, Linux {kernel}, {module}")?;
        if *lends_memory {
            write!(f, ", gives free memory back to its hypervisor (figures vary)")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_one_line() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A Processor\nflags\t: fpu\nmodel name\t: B";
        assert_eq!(processor(cpuinfo), Some("A Processor"));
        assert_eq!(processor("nothing"), None);
        let host = Host {
            cores: 2,
            processor: "A Processor".into(),
            kernel: "6.1.0".into(),
            module: "kvm_amd".into(),
            lends_memory: false,
        };
        assert_eq!(host.to_string(), "2 cores of A Processor, Linux 6.1.0, kvm_amd");
        let lending = Host { lends_memory: true, ..host };
        assert!(lending.to_string().contains("kvm_amd, gives free memory back"), "{lending}");
        assert!(Host::this().cores > 0);
    }

    #[test]
    fn a_balloon_that_reports_free_pages_is_known_by_its_feature() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!lends_memory(&folder.path().join("no driver")));
        std::fs::write(folder.path().join("bind"), "").unwrap();
        let device = folder.path().join("virtio0");
        std::fs::create_dir(&device).unwrap();
        std::fs::write(device.join("features"), "11100011\n").unwrap();
        assert!(!lends_memory(folder.path()));
        std::fs::write(device.join("features"), "0000010\n").unwrap();
        assert!(lends_memory(folder.path()));
    }

    #[test]
    fn memory_that_is_left_is_found() {
        let meminfo =
            "MemTotal:       24683520 kB\nMemFree:          460800 kB\nMemAvailable:   22700032 kB\n";
        assert_eq!(available(meminfo), Some(22_700_032 << 10));
        assert_eq!(available("MemFree:          460800 kB"), None);
        assert!(available_bytes().is_some_and(|bytes| bytes > 0));
    }
}
