//! The reference: fio's io_uring on the same file at the same depth, without a virtual machine.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Deserialize;

/// fio, installed.
#[derive(Clone, Debug)]
pub struct Fio {
    /// What it calls itself.
    pub version: String,
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    read: Rates,
}

#[derive(Deserialize)]
struct Rates {
    iops: f64,
}

impl Fio {
    /// Looks for it.
    #[must_use]
    pub fn find() -> Option<Self> {
        let output = Command::new("fio").arg("--version").output().ok()?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(Self { version })
    }

    /// How many random 4 KiB blocks a second it reads of `file`, with `depth` at a time, within `window`.
    ///
    /// # Errors
    /// It fails, or says something else than figures.
    pub fn read_rate(&self, file: &Path, direct: bool, depth: u32, window: Duration) -> anyhow::Result<f64> {
        let output = Command::new("fio")
            .args(["--name=reference", "--rw=randread", "--bs=4k", "--ioengine=io_uring", "--norandommap"])
            .args(["--time_based", "--invalidate=0", "--output-format=json", "--readonly"])
            .arg(format!("--filename={}", file.display()))
            .arg(format!("--direct={}", u8::from(direct)))
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--runtime={}ms", window.as_millis()))
            .output()
            .context("cannot start fio")?;
        ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        rate(&output.stdout)
    }
}

fn rate(output: &[u8]) -> anyhow::Result<f64> {
    // It may say something before its figures.
    let start = output.iter().position(|&byte| byte == b'{').context("fio gave no figures")?;
    let output: Output = serde_json::from_slice(&output[start..]).context("cannot read fio's figures")?;
    let job = output.jobs.first().context("fio ran no job")?;
    Ok(job.read.iops)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_behind_other_words() {
        let output = br#"fio: a warning
{ "fio version": "fio-3.33", "jobs": [ { "jobname": "reference", "read": { "iops": 1234.5, "bw": 1 } } ] }"#;
        assert_eq!(rate(output).unwrap(), 1234.5);
        assert!(rate(b"nothing").is_err());
        assert!(rate(br#"{ "jobs": [] }"#).is_err());
    }
}
