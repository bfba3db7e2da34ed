//! `ferry migrate`: asks a machine to move, and shows how it goes.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::SIGINT;
use transport::Uri;

use super::control::{TOO_LATE_TO_CANCEL, word};
use super::output::{say, tell};
use crate::control::{
    Client, DiskStats, FerryChannel, FerryDowntime, FerryPostcopy, Finished, Limits, MigrateRequest,
    MigrationInfo, MigrationStatus, RamStats,
};

/// Exit status after a second Ctrl-C: the shell's for SIGINT.
const INTERRUPTED: i32 = 130;

/// How the machine calls a socket that it is given.
const GIVEN: &str = "ferry-migrate";

/// So many channels are told of one by one.
const CHANNELS_TOLD: usize = 8;

/// How often a line is written where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Which machine moves where. Its help stands at [`super::Command::Migrate`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry migrate --api vm.sock unix:/run/move.sock
  ferry migrate --api vm.sock --downtime-limit 20 --max-bandwidth 200M tcp:127.0.0.1:4444
  # A guest that dirties its memory faster than it goes is slowed down, and stopped after two minutes whatever that costs:
  ferry migrate --api vm.sock --auto-converge --timeout 120 --on-timeout force unix:/run/move.sock
  # Returns at once; ferry status tells how it goes, ferry limits changes it, ferry cancel ends it:
  ferry migrate --api vm.sock --detach --max-bandwidth 100M tcp:127.0.0.1:4444
  ferry migrate --api vm.sock --channels 4 --compress zstd tcp:127.0.0.1:4444
  ferry migrate --api vm.sock --tls-dir /etc/ferry tcp:node2.example:4444
  ferry migrate --api vm.sock --local unix:/run/move.sock
  ferry migrate --api vm.sock fd:7 7<>/dev/tcp/127.0.0.1/4444      # in bash
  ferry migrate --api vm.sock --postcopy tcp:127.0.0.1:4444
  ferry migrate --api vm.sock --with-storage --tls-dir /etc/ferry tcp:node2.example:4444
  ferry migrate --api vm.sock file:suspended.ferry")]
pub struct MigrateArguments {
    /// Control socket of the machine (its --api).
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its documentation would be the help of this command")]
    pub limits: Limits,
    /// Go by TLS 1.3, with ca.pem, cert.pem and key.pem of this folder, which the machine's process reads: the destination is
    /// believed if its certificate is signed by an authority of ca.pem and valid for the HOST of the address (for localhost with
    /// unix:PATH), and has to believe ours.
    #[arg(long, value_name = "DIR", conflicts_with = "insecure")]
    pub tls_dir: Option<PathBuf>,
    /// Go to another host without TLS: whoever is on the network can read and change the guest.
    #[arg(long)]
    pub insecure: bool,
    /// Give a process of this host, of this version or a newer one, the memory itself over the Unix socket instead of its contents: the
    /// guest is stopped for as long whatever its size, and limits have nothing to limit. Where that cannot be, the contents are sent.
    /// The files of its images go along: they are the ones that the destination opens, whatever their names lead to by then.
    #[arg(long)]
    pub local: bool,
    /// Let the guest run at the destination before all of its memory is there: after the first pass over it, unless the rest fits into the
    /// downtime limit, or now. What it touches comes at once, the rest at the speed of --max-bandwidth. Until all has come the guest needs
    /// both processes and dies with either; a lost link is replaced by `ferry recover`.
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "after-first-round")]
    pub postcopy: Option<PostcopyWhen>,
    /// Take the images along that the guest may write, to a host that shares none with this one and waits with ferry run --with-storage.
    /// Holes stay holes. What is left here when the guest has gone is stale, and refused by ferry run, each image for itself: a mark
    /// beside it (PATH.ferry-mark) says where it went. Each host has its own lease, so that a link that breaks at the very end may need an
    /// operator (ferry confirm, ferry reclaim).
    #[arg(long, conflicts_with_all = ["local", "postcopy"])]
    pub with_storage: bool,
    /// Return when the migration has begun, and leave it to the machine: `ferry status` tells how it goes. The exit status then says
    /// nothing about its end.
    #[arg(long)]
    pub detach: bool,
    /// Print the report in JSON.
    #[arg(long)]
    pub json: bool,
    /// Where to: unix:PATH, tcp:HOST:PORT, fd:N (a connected socket that this command inherits as descriptor N and gives to the
    /// machine; names of sockets are for QMP, where getfd gives them), or file:PATH[,layout=stream] to suspend the guest into a new
    /// file, whose pages lie at fixed places unless the layout is that of a stream.
    #[arg(value_name = "URI", value_parser = inherited_by_number)]
    pub uri: Uri,
}

/// An address, in which a socket that is there already is meant by its number: nobody has given any a name yet.
fn inherited_by_number(text: &str) -> Result<Uri, String> {
    let uri: Uri = text.parse().map_err(|error: transport::Error| error.to_string())?;
    if matches!(uri, Uri::Fd(_)) && uri.descriptor_number().is_none() {
        return Err(
            "fd: takes the number of a connected socket that this command inherits, as in fd:7".to_owned()
        );
    }
    Ok(uri)
}

/// When guest memory begins to follow after the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PostcopyWhen {
    /// After the first pass over memory, unless the rest fits into the downtime limit.
    AfterFirstRound,
    /// Without any pass.
    Now,
}

impl PostcopyWhen {
    fn name(self) -> &'static str {
        match self {
            Self::AfterFirstRound => "after-first-round",
            Self::Now => "now",
        }
    }
}

/// Which machine has lost its links. Its help stands at [`super::Command::Recover`].
#[derive(Clone, Debug, Args)]
pub struct RecoverArguments {
    /// Control socket of the machine (its --api).
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    /// Print the report in JSON.
    #[arg(long)]
    pub json: bool,
    /// At a source, where the destination is now; at a destination, where to listen: unix:PATH or tcp:HOST:PORT [as before].
    #[arg(value_name = "URI")]
    pub uri: Option<Uri>,
}

impl RecoverArguments {
    /// Goes on with a migration that has lost its links.
    ///
    /// # Errors
    /// No machine answers, it refused, or its process went away before the guest had all of its memory.
    pub fn execute(&self) -> anyhow::Result<()> {
        let uri = self.uri.as_ref().map(absolute).transpose()?.map(|uri| uri.to_string());
        let mut client = Client::connect(&self.api)?;
        let mut display = Display::new();
        let finished = client.recover(uri.as_deref(), |info| display.show(info));
        display.end();
        match finished.context("the recovery")? {
            None if self.json => say!("{{}}")?,
            None => say!("waits for the source; recover it too")?,
            Some(finished) if self.json && finished.info.status.is_final() => {
                say!("{}", serde_json::to_string(&finished)?)?;
            }
            Some(finished) if finished.info.status == MigrationStatus::Completed => {
                say!("the guest has all of its memory{}", summary(&finished))?;
            }
            Some(Finished { info, details }) if info.status == MigrationStatus::PostcopyPaused => {
                let why = details.and_then(|details| details.postcopy).and_then(|postcopy| postcopy.paused);
                bail!(
                    "the link is lost, and the guest waits: {}",
                    why.as_deref().unwrap_or("no reason given")
                )
            }
            Some(finished) => {
                bail!(
                    "the migration failed: {}",
                    finished.info.error_desc.as_deref().unwrap_or("no reason given")
                )
            }
        }
        Ok(())
    }
}

impl MigrateArguments {
    /// Migrates.
    ///
    /// # Errors
    /// No machine answers, or it refused, or the guest did not move; the reason is the machine's.
    pub fn execute(&self) -> anyhow::Result<()> {
        // First: nothing of ours may have its number.
        let given = self.uri.descriptor_number().map(transport::inherit).transpose()?;
        let uri = absolute(&self.uri)?.to_string();
        let mut client = Client::connect(&self.api)?;
        if let Some(descriptor) = given {
            client.give(&descriptor, GIVEN)?;
        }
        let request = MigrateRequest {
            uri: if self.uri.descriptor_number().is_some() { format!("fd:{GIVEN}") } else { uri.clone() },
            limits: self.limits,
            tls_dir: self.tls_dir.as_deref().map(whole).transpose()?,
            insecure: self.insecure,
            local: self.local,
            postcopy: self.postcopy.map(|start| start.name().to_owned()),
            storage: self.with_storage,
        };
        if self.detach {
            client.begin_migration(&request).with_context(|| format!("the migration to {uri}"))?;
            match self.json {
                true => say!("{}", serde_json::to_string(&MigrationInfo::new(MigrationStatus::Setup))?)?,
                false => say!("the migration to {uri} has begun")?,
            }
            return Ok(());
        }
        let mut display = Display::new();
        let cancelled = cancelled_by_interrupt()?;
        let mut is_told = false;
        let finished = client.migrate(&request, &cancelled, |info| {
            display.show(info);
            if info.status.is_postcopy() && !is_told && cancelled.load(Ordering::Relaxed) {
                display.say(&format!("{TOO_LATE_TO_CANCEL}; Ctrl-C again stops watching"));
                is_told = true;
            }
        });
        display.end();
        let finished = finished.with_context(|| format!("the migration to {uri}"))?;
        // What became of the guest is said in any case.
        let written = if self.json { say!("{}", serde_json::to_string(&finished)?) } else { Ok(()) };
        let reason = finished.info.error_desc.as_deref().unwrap_or("no reason given");
        match finished.info.status {
            MigrationStatus::Completed if self.json => written,
            MigrationStatus::Completed => {
                say!("migrated to {uri}{}", summary(&finished))?;
                details(&finished).iter().try_for_each(|line| say!("  {line}"))
            }
            MigrationStatus::Cancelled => {
                let stays_paused = reason.split_once("; ").map(|(_, why)| format!("; {why}"));
                bail!(
                    "the migration to {uri} was cancelled: the guest was not moved{}",
                    stays_paused.unwrap_or_default()
                )
            }
            _ => bail!("the migration to {uri} failed: {reason}"),
        }
    }
}

/// A flag that the first Ctrl-C sets; the second ends this process.
fn cancelled_by_interrupt() -> anyhow::Result<Arc<AtomicBool>> {
    let cancelled = Arc::new(AtomicBool::new(false));
    // The order matters: when the flag is set already, the first of them ends the process.
    signal_hook::flag::register_conditional_shutdown(SIGINT, INTERRUPTED, cancelled.clone())
        .and_then(|_| signal_hook::flag::register(SIGINT, cancelled.clone()))
        .context("Ctrl-C cannot be handled")?;
    Ok(cancelled)
}

/// The machine may have another working directory.
fn whole(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{}", path.display()))
}

fn absolute(uri: &Uri) -> anyhow::Result<Uri> {
    Ok(match uri {
        Uri::Unix(path) => Uri::Unix(whole(path)?),
        Uri::File { path, layout } => Uri::File { path: whole(path)?, layout: *layout },
        Uri::Tcp { .. } | Uri::Fd(_) => uri.clone(),
    })
}

/// A bar on a terminal, lines elsewhere; both on standard error.
pub(super) struct Display {
    bar: ProgressBar,
    lines: bool,
    written: Option<(String, MigrationStatus, Instant)>,
}

impl Display {
    pub(super) fn new() -> Self {
        let lines = !std::io::stderr().is_terminal();
        let target = if lines { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(None, target);
        Self { bar, lines, written: None }
    }

    pub(super) fn show(&mut self, info: &MigrationInfo) {
        let text = progress(info);
        if self.lines {
            if self.is_due(info.status, &text) {
                tell!("{text}");
                self.written = Some((text, info.status, Instant::now()));
            }
            return;
        }
        if let Some(ram) = &info.ram {
            if self.bar.length().is_none()
                && let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes}  {msg}")
            {
                self.bar.set_style(style);
            }
            self.bar.set_length(ram.total);
            self.bar.set_position(ram.total.saturating_sub(ram.remaining));
        }
        self.bar.set_message(text);
        self.bar.tick();
    }

    /// Whether a line is written. What waits for somebody, as for new links, does not say so every second.
    fn is_due(&self, status: MigrationStatus, text: &str) -> bool {
        self.written.as_ref().is_none_or(|(line, before, at)| {
            *before != status || (line != text && at.elapsed() >= LINE_INTERVAL)
        })
    }

    /// Writes a line that stays.
    fn say(&self, line: &str) {
        self.bar.suspend(|| tell!("{line}"));
    }

    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// One line about a migration that runs.
fn progress(info: &MigrationInfo) -> String {
    let mut text = word(info.status);
    if let Some(RamStats { remaining, mbps, dirty_pages_rate, dirty_sync_count, page_size, .. }) = &info.ram {
        let throughput = HumanBytes((mbps * 1e6 / 8.0) as u64);
        let dirty = HumanBytes(dirty_pages_rate.saturating_mul(*page_size));
        text += &format!(
            ", round {dirty_sync_count}, {throughput}/s, dirties {dirty}/s, {} remain",
            HumanBytes(*remaining)
        );
    }
    if let Some(DiskStats { remaining, total, .. }) = &info.disk {
        text += &format!(", {} of {} of images remain", HumanBytes(*remaining), HumanBytes(*total));
    }
    if let Some(expected) = info.expected_downtime.filter(|expected| *expected > 0) {
        text += &format!(", would stop for {expected} ms");
    }
    if let Some(percent) = info.cpu_throttle_percentage {
        text += &format!(", vCPUs slowed down by {percent} %");
    }
    if info.status == MigrationStatus::PostcopyPaused {
        text += ", the link is lost (ferry recover)";
    }
    text
}

/// What a completed migration cost.
fn summary(finished: &Finished) -> String {
    let Finished { info, details } = finished;
    let mut parts = Vec::new();
    parts.extend(info.total_time.map(|total| format!("{:.3} s", total as f64 / 1e3)));
    let exact =
        details.as_ref().and_then(|details| details.downtime).map(|downtime| downtime.total as f64 / 1e3);
    match (exact, info.downtime) {
        (Some(exact), _) => parts.push(format!("downtime {exact:.1} ms")),
        (None, Some(rounded)) => parts.push(format!("downtime {rounded} ms")),
        (None, None) => {}
    }
    let handed_over_bytes = details.as_ref().map_or(0, |details| details.handed_over_bytes);
    if let Some(ram) = &info.ram
        && handed_over_bytes > 0
    {
        let (memory, sent) = (HumanBytes(handed_over_bytes), HumanBytes(ram.transferred));
        parts.push(format!("{memory} of memory handed over, {sent} sent"));
    } else if let Some(ram) = &info.ram {
        let rounds = if ram.dirty_sync_count == 1 { "round" } else { "rounds" };
        parts.push(format!("{} {rounds}, {} sent", ram.dirty_sync_count, HumanBytes(ram.transferred)));
    }
    if let Some(DiskStats { transferred, .. }) = &info.disk {
        parts.push(format!("{} of them of images", HumanBytes(*transferred)));
    }
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

/// Where the time of the stop went, and what was sent: a line each.
fn details(finished: &Finished) -> Vec<String> {
    let Finished { info, details } = finished;
    let mut lines = Vec::new();
    let Some(details) = details else { return lines };
    if let Some(downtime) = &details.downtime {
        let FerryDowntime { total: _, stop, last_pass, device_save, transfer, load, handover, resume } =
            *downtime;
        let parts = [
            ("stop", stop),
            ("device state", device_save),
            ("last pass", last_pass),
            ("transfer", transfer),
            ("load", load),
            ("hand-over", handover),
            ("resume", resume),
        ];
        let parts = parts.map(|(name, time)| format!("{name} {:.2}", time as f64 / 1e3));
        lines.push(format!("stopped, ms: {}", parts.join(", ")));
    }
    if let Some(ram) = info.ram.as_ref().filter(|_| details.handed_over_bytes == 0) {
        let mut kinds =
            vec![format!("{} pages with contents", ram.normal), format!("{} zero", ram.duplicate)];
        if details.compressed_pages > 0 {
            let bytes = HumanBytes(details.compressed_bytes);
            kinds.push(format!("{} compressed to {bytes}", details.compressed_pages));
        }
        kinds.push(format!("{} of vCPUs and devices", HumanBytes(details.device_bytes)));
        kinds.push(format!("{} while stopped", HumanBytes(ram.downtime_bytes)));
        lines.push(format!("sent: {}", kinds.join(", ")));
    }
    if let Some(FerryPostcopy { bytes, requests, recoveries, .. }) = &details.postcopy {
        let mut parts = vec![HumanBytes(*bytes).to_string(), format!("{requests} pages asked for")];
        let times = if *recoveries == 1 { "once".to_owned() } else { format!("{recoveries} times") };
        parts.extend((*recoveries > 0).then(|| format!("links replaced {times}")));
        lines.push(format!("after the guest: {}", parts.join(", ")));
    }
    if details.channels.len() > CHANNELS_TOLD {
        let rates = || details.channels.iter().map(|channel| channel.bytes_per_second);
        let (bytes, pages) = details.channels.iter().fold((0_u64, 0_u64), |(bytes, pages), channel| {
            (bytes.saturating_add(channel.bytes), pages.saturating_add(channel.pages))
        });
        lines.push(format!(
            "by {} channels: {} in {pages} pages, each at {}/s to {}/s",
            details.channels.len(),
            HumanBytes(bytes),
            HumanBytes(rates().min().unwrap_or(0)),
            HumanBytes(rates().max().unwrap_or(0))
        ));
    } else if details.channels.iter().any(|channel| channel.bytes > 0) {
        let channels = details.channels.iter().map(|channel| {
            let FerryChannel { bytes, pages, bytes_per_second } = *channel;
            format!("{} in {pages} pages at {}/s", HumanBytes(bytes), HumanBytes(bytes_per_second))
        });
        lines.push(format!("by channel: {}", channels.collect::<Vec<_>>().join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::FerryMigration;

    fn active() -> MigrationInfo {
        let ram = RamStats {
            transferred: 5 << 20,
            remaining: 1 << 20,
            total: 16 << 20,
            dirty_pages_rate: 256,
            mbps: 8.0 * 1.048576,
            dirty_sync_count: 3,
            page_size: 4096,
            ..RamStats::default()
        };
        MigrationInfo {
            ram: Some(ram),
            expected_downtime: Some(7),
            ..MigrationInfo::new(MigrationStatus::Active)
        }
    }

    #[test]
    fn progress_is_one_line() {
        assert_eq!(progress(&MigrationInfo::new(MigrationStatus::Setup)), "setup");
        assert_eq!(
            progress(&active()),
            "active, round 3, 1.00 MiB/s, dirties 1.00 MiB/s, 1.00 MiB remain, would stop for 7 ms"
        );
        let disk = Some(DiskStats { remaining: 3 << 20, total: 5 << 30, ..DiskStats::default() });
        let text = progress(&MigrationInfo { disk, ..active() });
        assert!(text.contains("3.00 MiB of 5.00 GiB of images remain"), "{text}");
        let slowed = MigrationInfo { cpu_throttle_percentage: Some(30), ..active() };
        assert!(progress(&slowed).ends_with(", would stop for 7 ms, vCPUs slowed down by 30 %"));
        let lost = MigrationInfo::new(MigrationStatus::PostcopyPaused);
        assert_eq!(progress(&lost), "postcopy-paused, the link is lost (ferry recover)");
    }

    #[test]
    fn summary_says_what_is_known() {
        let info = MigrationInfo { total_time: Some(1234), downtime: Some(12), ..active() };
        let mut finished = Finished { info, details: None };
        assert_eq!(summary(&finished), " (1.234 s, downtime 12 ms, 3 rounds, 5.00 MiB sent)");
        let downtime = Some(FerryDowntime { total: 12_345, ..FerryDowntime::default() });
        finished.details = Some(FerryMigration { downtime, ..FerryMigration::default() });
        assert_eq!(summary(&finished), " (1.234 s, downtime 12.3 ms, 3 rounds, 5.00 MiB sent)");
        let handed_over = Some(FerryMigration { handed_over_bytes: 1 << 30, ..FerryMigration::default() });
        finished.details = handed_over;
        assert_eq!(
            summary(&finished),
            " (1.234 s, downtime 12 ms, 1.00 GiB of memory handed over, 5.00 MiB sent)"
        );
        let bare = Finished { info: MigrationInfo::new(MigrationStatus::Completed), details: None };
        assert_eq!(summary(&bare), "");
    }

    #[test]
    fn details_say_where_time_and_bytes_went() {
        let mut finished = Finished { info: active(), details: None };
        assert_eq!(details(&finished), [""; 0]);
        let downtime = FerryDowntime { total: 2400, stop: 310, last_pass: 1200, ..FerryDowntime::default() };
        let migration = FerryMigration {
            downtime: Some(downtime),
            channels: vec![
                FerryChannel { bytes: 3 << 20, pages: 70, bytes_per_second: 6 << 20 },
                FerryChannel { bytes: 2 << 20, pages: 17, bytes_per_second: 4 << 20 },
            ],
            device_bytes: 5120,
            compressed_pages: 9,
            compressed_bytes: 2048,
            ..FerryMigration::default()
        };
        finished.details = Some(migration.clone());
        finished.info.ram = finished.info.ram.map(|ram| RamStats { normal: 80, duplicate: 7, ..ram });
        assert_eq!(
            details(&finished),
            [
                "stopped, ms: stop 0.31, device state 0.00, last pass 1.20, transfer 0.00, load 0.00, hand-over 0.00, resume 0.00",
                "sent: 80 pages with contents, 7 zero, 9 compressed to 2.00 KiB, 5.00 KiB of vCPUs and devices, 0 B while stopped",
                "by channel: 3.00 MiB in 70 pages at 6.00 MiB/s, 2.00 MiB in 17 pages at 4.00 MiB/s",
            ]
        );
        finished.details = Some(FerryMigration { handed_over_bytes: 1 << 30, downtime: None, ..migration });
        let lines = details(&finished);
        assert!(lines.len() == 1 && lines[0].starts_with("by channel: 3.00 MiB in 70 pages"), "{lines:?}");
    }

    #[test]
    fn nothing_is_said_twice_in_a_row() {
        let mut display = Display::new();
        let (paused, active) = (MigrationStatus::PostcopyPaused, MigrationStatus::PostcopyActive);
        assert!(display.is_due(paused, "waits"));
        let long_ago = Instant::now().checked_sub(LINE_INTERVAL).unwrap();
        display.written = Some(("waits".to_owned(), paused, long_ago));
        assert!(!display.is_due(paused, "waits"));
        assert!(display.is_due(active, "waits") && display.is_due(paused, "waits for another"));
        display.written = Some(("waits".to_owned(), paused, Instant::now() + LINE_INTERVAL));
        assert!(!display.is_due(paused, "waits for another"), "a line a second");
    }

    #[test]
    fn many_channels_are_one_figure() {
        let channels = (0..9).map(|index| FerryChannel {
            bytes: 1 << 20,
            pages: 256,
            bytes_per_second: (index + 1) << 20,
        });
        let details_of = FerryMigration { channels: channels.collect(), ..FerryMigration::default() };
        let lines = details(&Finished {
            info: MigrationInfo::new(MigrationStatus::Completed),
            details: Some(details_of),
        });
        assert_eq!(lines, ["by 9 channels: 9.00 MiB in 2304 pages, each at 1.00 MiB/s to 9.00 MiB/s"]);
    }

    #[test]
    fn what_followed_the_guest_is_told_apart() {
        let mut finished = Finished { info: MigrationInfo::new(MigrationStatus::Completed), details: None };
        let mut told = |recoveries| {
            let postcopy =
                FerryPostcopy { bytes: 3 << 20, requests: 12, recoveries, ..FerryPostcopy::default() };
            finished.details = Some(FerryMigration { postcopy: Some(postcopy), ..FerryMigration::default() });
            details(&finished)
        };
        assert_eq!(told(0), ["after the guest: 3.00 MiB, 12 pages asked for"]);
        assert_eq!(told(2), ["after the guest: 3.00 MiB, 12 pages asked for, links replaced 2 times"]);
    }

    #[test]
    fn help_names_the_default_number_of_channels() {
        let help =
            <Limits as clap::Args>::augment_args(clap::Command::new("test")).render_long_help().to_string();
        assert!(
            help.contains(&format!("begin later [at its start: {}]", engine::CHANNELS_DEFAULT)),
            "{help}"
        );
    }

    /// By QMP, where names can be given, they lead to sockets: `control::tests` and the tests of real processes have that.
    #[test]
    fn a_socket_is_named_by_its_number() {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            arguments: MigrateArguments,
        }
        let parse = |uri| <Command as clap::Parser>::try_parse_from(["migrate", "--api", "vm.sock", uri]);
        let uri = |uri| parse(uri).ok().map(|command| command.arguments.uri);
        assert_eq!(uri("fd:7"), Some(Uri::Fd("7".to_owned())));
        assert_eq!(
            uri("tcp:localhost:4444").map(|uri| uri.to_string()).as_deref(),
            Some("tcp:localhost:4444")
        );
        for (wrong, sentence) in [
            ("fd:x", "fd: takes the number of a connected socket that this command inherits, as in fd:7"),
            ("fd:7x", "fd: takes the number"),
            ("fd:", "the number or name of a descriptor is missing"),
            ("nowhere:", "the scheme is none of unix, tcp, fd and file"),
        ] {
            let error = parse(wrong).err().expect("it is refused").to_string();
            assert!(error.contains(sentence), "{wrong}: {error}");
        }
    }

    #[test]
    fn relative_paths_are_meant_from_here() {
        let here = std::env::current_dir().unwrap();
        let uri = absolute(&"unix:a/b".parse().unwrap()).unwrap();
        assert_eq!(uri, Uri::Unix(here.join("a/b")));
        let tcp: Uri = "tcp:127.0.0.1:1".parse().unwrap();
        assert_eq!(absolute(&tcp).unwrap(), tcp);
    }
}
