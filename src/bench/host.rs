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
}

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
        }
    }
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
        let Self { cores, processor, kernel, module } = self;
        write!(f, "{cores} cores of {processor}, Linux {kernel}, {module}")
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
        };
        assert_eq!(host.to_string(), "2 cores of A Processor, Linux 6.1.0, kvm_amd");
        assert!(Host::this().cores > 0);
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
