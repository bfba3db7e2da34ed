//! What a data channel carries, on the control socket.

use engine::Snapshot;
use serde::{Deserialize, Serialize};

/// One data channel of a migration: what it has sent at the source, and received at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FerryChannel {
    /// Heads, digests and contents.
    pub bytes: u64,
    /// Pages, those that are zero included.
    pub pages: u64,
    /// Bytes a second of the time in which memory moved.
    pub bytes_per_second: u64,
}

impl FerryChannel {
    /// All channels of a migration, in their order.
    #[must_use]
    pub fn all(snapshot: &Snapshot) -> Vec<Self> {
        let amounts = snapshot.channel_bytes.iter().zip(&snapshot.channel_pages);
        let all = amounts.zip(snapshot.channel_bytes_per_second());
        all.map(|((bytes, pages), bytes_per_second)| Self { bytes: *bytes, pages: *pages, bytes_per_second })
            .collect()
    }
}
