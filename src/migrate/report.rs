//! The engine's figures in the words of the control socket.

use std::sync::atomic::Ordering;
use std::time::Duration;

use engine::lease::show_id;
use engine::{PAGE_BYTES, Postcopy, Snapshot, Status};

use super::{Migrations, lock};
use crate::control::{
    DiskStats, FerryChannel, FerryDowntime, FerryMigration, FerryPostcopy, MigrationInfo, MigrationStatus,
    RamStats,
};

impl Migrations {
    /// What `query-migrate` answers, apart from what stands in the way of a migration.
    #[must_use]
    pub fn info(&self) -> Option<MigrationInfo> {
        let current = lock(&self.current);
        let current = current.as_ref()?;
        let snapshot = current.statistics.snapshot();
        let mut info = MigrationInfo::new(match qmp_status(snapshot.status) {
            // Its thread has not come to say so yet.
            None if current.outgoing => MigrationStatus::Setup,
            status => status?,
        });
        info.total_time = Some(milliseconds(snapshot.elapsed));
        if snapshot.total_bytes > 0 {
            info.setup_time = Some(milliseconds(snapshot.setup));
            info.ram = Some(ram_stats(&snapshot));
        }
        info.disk = snapshot.storage.map(|storage| DiskStats {
            transferred: storage.transferred_bytes,
            remaining: storage.remaining_bytes,
            total: storage.total_bytes,
            dirty_sync_count: storage.rounds.into(),
            downtime_bytes: storage.downtime_bytes,
        });
        match snapshot.status {
            Status::Active => {
                info.expected_downtime = Some(milliseconds(snapshot.expected_downtime));
                info.cpu_throttle_percentage = Some(snapshot.throttle_percent).filter(|percent| *percent > 0);
            }
            Status::Completed => info.downtime = Some(milliseconds(snapshot.downtime.total)),
            _ => {}
        }
        if let Some(postcopy) = &snapshot.postcopy {
            info.downtime = Some(milliseconds(snapshot.downtime.total));
            if !current.outgoing {
                info.postcopy_blocktime = Some(milliseconds(postcopy.blocktime));
                info.postcopy_latency = u64::try_from(postcopy.latency_median.as_nanos()).ok();
            }
        }
        info.x_ferry_channels = FerryChannel::all(&snapshot);
        info.x_ferry_device_bytes = Some(snapshot.device_bytes).filter(|bytes| *bytes > 0);
        info.error_desc = snapshot.error;
        Some(info)
    }

    /// The part of `x-ferry-status` about the latest migration.
    #[must_use]
    pub fn detail(&self) -> Option<FerryMigration> {
        let current = lock(&self.current);
        let current = current.as_ref()?;
        let snapshot = current.statistics.snapshot();
        let downtime = snapshot.downtime;
        let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Some(FerryMigration {
            phase: snapshot.status.name().to_owned(),
            peer: current.peer.clone(),
            rounds: snapshot.rounds,
            handed_over_bytes: snapshot.handed_over_bytes,
            throttle_percentage: snapshot.throttle_percent,
            in_flight_at_stop: current.in_flight_at_stop.load(Ordering::Relaxed),
            channel_bytes: snapshot.channel_bytes.clone(),
            channels: FerryChannel::all(&snapshot),
            device_bytes: snapshot.device_bytes,
            compressed_pages: snapshot.compressed_pages,
            compressed_bytes: snapshot.compressed_bytes,
            downtime: (!downtime.total.is_zero()).then(|| FerryDowntime {
                total: microseconds(downtime.total),
                stop: microseconds(downtime.stop),
                device_save: microseconds(downtime.device_save),
                last_pass: microseconds(downtime.last_pass),
                transfer: microseconds(downtime.transfer),
                load: microseconds(downtime.load),
                handover: microseconds(downtime.handover),
                resume: microseconds(downtime.resume),
            }),
            postcopy: snapshot
                .postcopy
                .as_ref()
                .map(|postcopy| ferry_postcopy(postcopy, snapshot.remaining_bytes)),
            detail: snapshot.handover_unknown.or(snapshot.error).or_else(|| {
                let session = show_id(&snapshot.unacknowledged?);
                Some(format!(
                    "the guest of session {session} is here, and its source has not said that it knows"
                ))
            }),
        })
    }
}

/// QMP knows no migration without a status.
pub fn qmp_status(status: Status) -> Option<MigrationStatus> {
    Some(match status {
        Status::None => return None,
        Status::Setup => MigrationStatus::Setup,
        Status::Active => MigrationStatus::Active,
        Status::Device | Status::HandoverUnknown => MigrationStatus::Device,
        Status::PostcopyActive => MigrationStatus::PostcopyActive,
        Status::PostcopyPaused => MigrationStatus::PostcopyPaused,
        Status::PostcopyRecover => MigrationStatus::PostcopyRecover,
        Status::Completed => MigrationStatus::Completed,
        Status::Failed => MigrationStatus::Failed,
        Status::Cancelling => MigrationStatus::Cancelling,
        Status::Cancelled => MigrationStatus::Cancelled,
    })
}

fn ram_stats(snapshot: &Snapshot) -> RamStats {
    let pages_per_second = snapshot.bytes_per_second / PAGE_BYTES;
    RamStats {
        transferred: snapshot.transferred_bytes,
        remaining: snapshot.remaining_bytes,
        total: snapshot.total_bytes,
        duplicate: snapshot.zero_pages,
        normal: snapshot.normal_pages,
        normal_bytes: snapshot.normal_pages.saturating_mul(PAGE_BYTES),
        dirty_pages_rate: snapshot.dirty_pages_per_second,
        mbps: snapshot.bytes_per_second as f64 * 8.0 / 1e6,
        dirty_sync_count: snapshot.rounds.into(),
        page_size: PAGE_BYTES,
        multifd_bytes: snapshot.channel_bytes.iter().sum(),
        pages_per_second,
        precopy_bytes: snapshot.transferred_bytes.saturating_sub(snapshot.downtime_bytes),
        downtime_bytes: snapshot.downtime_bytes,
        postcopy_requests: snapshot.postcopy.as_ref().map_or(0, |postcopy| postcopy.requests),
        postcopy_bytes: snapshot.postcopy.as_ref().map_or(0, |postcopy| postcopy.bytes),
        ..RamStats::default()
    }
}

fn ferry_postcopy(postcopy: &Postcopy, missing_bytes: u64) -> FerryPostcopy {
    let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let threads = postcopy.threads.iter();
    FerryPostcopy {
        missing_bytes,
        bytes: postcopy.bytes,
        requests: postcopy.requests,
        zero_faults: postcopy.zero_faults,
        blocktime: microseconds(postcopy.blocktime),
        thread_blocktime: threads.map(|(name, time)| (name.clone(), microseconds(*time))).collect(),
        latency_median: microseconds(postcopy.latency_median),
        latency_max: microseconds(postcopy.latency_max),
        recoveries: postcopy.recoveries,
        paused: postcopy.paused.clone(),
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
