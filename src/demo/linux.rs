//! With the Linux test guest of this checkout: ext4 on one namespace, plain blocks on the others.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::report::{Checked, Report};
use super::{Audience, destination};
use crate::drive::{Process, Stage};

/// Verified blocks on each side that the demonstration waits for: Linux is slow where ring 0 is interpreted.
const ENOUGH: u64 = 128;
/// Size of the disk that is a file.
const DISK_BYTES: u64 = 128 << 20;
/// How long the guest may take for anything that it is waited for.
const WATCHDOG: Duration = Duration::from_secs(180);
/// Takes nothing that a host without VMX and SVM lacks; harmless elsewhere.
const CMDLINE: &str = "console=ttyS0 panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=1 \
    reboot=k noxsave clearcpuid=smap,smep,popcnt,rdtscp,erms,fsrm,rdpid rodata=off quiet noreplace-smp \
    percpu_alloc=page ferry.namespaces=3";

/// Moves Linux while it writes and reads its disks.
///
/// # Errors
/// The guest cannot be built, a process failed, or the guest found an error; with what both sides wrote last.
pub fn run(stage: &mut Stage, audience: &mut dyn Audience) -> anyhow::Result<Report> {
    let guest = build(audience)?;
    let disk = stage.folder().join("disk.img");
    make_ext4(&disk)?;
    let machine = stage.machine([
        "--cpus".to_owned(),
        "2".to_owned(),
        "--memory".to_owned(),
        "128M".to_owned(),
        "--tables".to_owned(),
        "mp".to_owned(),
        "--nvme".to_owned(),
        "serial=demo,queues=8".to_owned(),
        "--ns".to_owned(),
        format!("controller=demo,nsid=1,backend=file,path={}", disk.display()),
        "--ns".to_owned(),
        "controller=demo,nsid=3,backend=memory,size=16M,lba=4096".to_owned(),
        "--ns".to_owned(),
        "controller=demo,nsid=7,backend=memory,size=16M".to_owned(),
    ]);

    let started = Instant::now();
    let mut source = machine.start(
        "source",
        [
            "--kernel".into(),
            guest.join("vmlinux").into(),
            "--initrd".into(),
            guest.join("initramfs.cpio").into(),
            "--cmdline".into(),
            CMDLINE.into(),
        ],
    )?;
    stage.enter(&source)?;
    audience.hear(&format!("Linux boots in process {}: 2 vCPUs, 128 MiB RAM", source.id()));
    let mut reader = Reader::default();
    reader.wait(&source, "init", |line| (line == "init").then_some(()))?;
    let boot = started.elapsed();
    audience.hear(&format!("its init runs after {:.1} s", boot.as_secs_f64()));
    reader.wait_for_verified(&source, ENOUGH)?;
    let mut destination = destination(stage, &machine)?;
    audience.hear(&format!("moving to process {}", destination.id()));
    let finished = source.migrate_to(&mut destination, |progress| audience.see(progress))?;

    let before = reader.latest(&source);
    let mut reader = Reader::default();
    let first = reader.wait_for_verified(&destination, 0)?;
    let last = reader.wait_for_verified(&destination, first + ENOUGH)?;
    for ended in [source, destination] {
        ensure!(!ended.console.all().iter().any(|line| is_error(line)), ended.describe("an error in"));
        ended.quit()?;
    }
    let report = Report::new(&finished, "linux")?;
    Ok(Report {
        verified: Checked { before, after: last - first },
        boot_milliseconds: u64::try_from(boot.as_millis()).ok(),
        ..report
    })
}

/// The folder with kernel and initial RAM disk, built if it is not there.
fn build(audience: &mut dyn Audience) -> anyhow::Result<PathBuf> {
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources");
    let (setup, build) = (resources.join("setup"), resources.join("guest/build"));
    ensure!(
        setup.exists() && build.exists(),
        "the Linux guest is built from the source of ferry, which is not at {} any more",
        resources.display()
    );
    audience.hear("looking for the Linux guest; the first time it is built, which takes minutes");
    call(&mut Command::new(setup))?;
    let output = call(Command::new(build).arg("fast"))?;
    let folder = output.lines().last().context("resources/guest/build says no folder")?;
    Ok(folder.into())
}

fn make_ext4(path: &Path) -> anyhow::Result<()> {
    File::create(path)
        .and_then(|file| file.set_len(DISK_BYTES))
        .with_context(|| format!("cannot make {}", path.display()))?;
    // It is where only root's PATH leads.
    let folders = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    call(Command::new("mke2fs").env("PATH", folders).args(["-q", "-t", "ext4"]).arg(path))?;
    Ok(())
}

/// Runs a command that may talk on standard error; returns its standard output, which is shown if it fails.
fn call(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let errors = std::io::stderr().as_fd().try_clone_to_owned().context("cannot share standard error")?;
    let output = command
        .stdin(Stdio::null())
        .stderr(errors)
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{name} failed ({})\n{text}", output.status);
    Ok(text)
}

/// What the guest's init says on one console, from the first line on.
#[derive(Default)]
struct Reader {
    next: usize,
}

impl Reader {
    /// Waits for words of init that `select` takes; an error that it reports ends the wait.
    fn wait<T>(
        &mut self,
        process: &Process,
        what: &str,
        select: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let (found, next) = process.wait_for_line(what, self.next, WATCHDOG, |line| {
            if is_error(line) { Some(None) } else { words(line).and_then(&select).map(Some) }
        })?;
        self.next = next;
        match found {
            Some(found) => Ok(found),
            None => bail!(process.describe("the guest reported an error:")),
        }
    }

    /// Waits until at least `count` blocks have been verified; returns how many.
    fn wait_for_verified(&mut self, process: &Process, count: u64) -> anyhow::Result<u64> {
        let what = format!("{count} verified blocks");
        self.wait(process, &what, |words| verified(words).filter(|verified| *verified >= count))
    }

    /// How many blocks have been verified by now.
    fn latest(&self, process: &Process) -> u64 {
        process.console.all().iter().filter_map(|line| words(line).and_then(verified)).max().unwrap_or(0)
    }
}

/// What follows `guest: `; the kernel's own text may stand before it.
fn words(line: &str) -> Option<&str> {
    line.split_once("guest: ").map(|(_, words)| words.trim_end())
}

fn verified(words: &str) -> Option<u64> {
    words.strip_prefix("verified ")?.parse().ok()
}

fn is_error(line: &str) -> bool {
    words(line).is_some_and(|words| words.starts_with("ERROR"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_init_are_read() {
        assert_eq!(words("[    1.0] guest: init\r"), Some("init"));
        assert_eq!(words("guest: verified 32").and_then(verified), Some(32));
        assert_eq!(words("verified 32"), None);
        assert_eq!(verified("verified many"), None);
        assert!(is_error("guest: ERROR block differs (7)") && !is_error("guest: end"));
    }

    #[test]
    fn an_error_of_init_ends_the_wait() {
        let script = "echo 'guest: verified 16'; echo 'guest: ERROR read (5)'; echo 'guest: verified 999'";
        let process = Process::spawn("guest", Path::new("/bin/sh"), ["-c", script]).unwrap();
        let mut reader = Reader::default();
        assert_eq!(reader.wait_for_verified(&process, 1).unwrap(), 16);
        let error = reader.wait_for_verified(&process, 100).unwrap_err().to_string();
        assert!(error.contains("ERROR read (5)"), "{error}");
    }

    #[test]
    fn a_command_that_fails_is_shown() {
        let error = call(Command::new("sh").args(["-c", "echo why; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("why") && error.contains("status: 3"), "{error}");
        assert_eq!(call(Command::new("echo").arg("fine")).unwrap(), "fine\n");
    }
}
