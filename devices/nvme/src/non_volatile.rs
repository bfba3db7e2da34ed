//! What outlives the controller's power, where there is a place for it.
//!
//! A controller with such a place offers to save features (Base 5.27) and keeps its firmware slots, write protection, logs and
//! operations over a power cycle. One without it keeps them as long as it lives, migration included, reports no feature as savable,
//! and does not offer permanent write protection.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use nvme_spec::Status;
use vmstate::VmState;

use crate::Error;
use crate::admin::{Admin, Phase};
use crate::controller::Controller;
use crate::restore::admin as restore;
use crate::save::admin as save;
use crate::shared::lock;
use crate::state::{FirmwareState, PersistentEventsState, SanitizeState, SavedFeaturesState, SelfTestState};

/// A place that outlives the controller's power.
pub trait NonVolatile: Send + Sync + Debug {
    /// Puts `kept` there instead of what was kept before, and returns when it is durable: a crash leaves the one or the other. Blocks
    /// worker 0's thread, after admin commands and operations that changed something.
    ///
    /// # Errors
    /// It could not be written; what was kept before is still there.
    fn keep(&self, kept: &KeptState) -> io::Result<()>;
}

/// What a controller keeps. Untrusted when it comes back.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/kept", version = 1)]
pub struct KeptState {
    /// Saved values of features.
    pub features: SavedFeaturesState,
    /// Firmware slots; nothing is staged.
    pub firmware: FirmwareState,
    /// Namespaces that are write protected.
    pub protected_count: u32,
    /// Their identifiers.
    #[vmstate(len = "protected_count", max = crate::config::MAX_NAMESPACES as usize)]
    pub protected: Vec<u32>,
    /// Those of them that stay so for ever.
    pub permanent_count: u32,
    /// Their identifiers.
    #[vmstate(len = "permanent_count", max = crate::config::MAX_NAMESPACES as usize)]
    pub permanent: Vec<u32>,
    /// Namespaces.
    pub format_count: u32,
    /// Their formats, which count for more than how they are configured.
    #[vmstate(len = "format_count", max = crate::config::MAX_NAMESPACES as usize)]
    pub formats: Vec<KeptFormatState>,
    /// Sanitize operations; one that was in progress begins its pass again.
    pub sanitize: SanitizeState,
    /// Results of self-tests; one that was in progress ends with the power.
    pub self_test: SelfTestState,
    /// The persistent event log, without a context.
    pub persistent_events: PersistentEventsState,
}

/// The format of a namespace.
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/kept-format", version = 1)]
pub struct KeptFormatState {
    /// Namespace identifier.
    pub nsid: u32,
    /// log2 of the size of a block in bytes.
    pub block_shift: u8,
    /// Metadata of the blocks, if they have some.
    #[vmstate(subsection)]
    pub metadata: Option<KeptMetadataState>,
}

/// The metadata of the blocks of a namespace.
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/kept-format/metadata", version = 1)]
pub struct KeptMetadataState {
    /// Bytes of each block.
    pub bytes: u16,
    /// They are transferred at the end of each block.
    pub extended: bool,
    /// Type of protection information, 0 for none.
    pub protection_type: u8,
    /// It is the first eight bytes of the metadata.
    pub protection_first: bool,
}

impl Controller {
    /// Gives a controller that nobody has used yet a place to keep things, and takes over what was kept there before.
    ///
    /// # Errors
    /// [`Error::State`]: no controller kept that; [`Error::NotPristine`].
    pub fn attach_non_volatile(
        &self,
        place: Arc<dyn NonVolatile>,
        kept: Option<&KeptState>,
    ) -> Result<(), Error> {
        let mut admin = lock(&self.admin);
        if admin.phase != Phase::Disabled || self.pool.shared.registers().cc.en() == 1 {
            return Err(Error::NotPristine);
        }
        if let Some(kept) = kept {
            restore::load_kept(&self.pool, &mut admin, kept)?;
        }
        admin.non_volatile = Some(place);
        Ok(())
    }
}

impl Admin {
    /// Keeps what is to be kept, where there is a place. A failure is the host's and is logged, once.
    pub fn keep(&mut self) {
        let _logged = self.try_keep();
    }

    /// As [`Admin::keep`], for a command that is no success if nothing was kept.
    pub fn try_keep(&mut self) -> Result<(), Status> {
        let Some(place) = &self.non_volatile else { return Ok(()) };
        place.keep(&save::kept_state(self)).map_err(|error| {
            if !std::mem::replace(&mut self.keep_failure_reported, true) {
                log::error!("what an NVMe controller is to keep cannot be written: {error}");
            }
            Status::INTERNAL_ERROR
        })
    }
}
