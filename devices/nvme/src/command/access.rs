//! What a host is told of asymmetric namespace access (Base 8.1, 5.16.1.13).

use std::sync::atomic::Ordering;

use nvme_spec::event::Event;
use nvme_spec::identify::{
    ANACAP_ALL_STATES, ANACAP_FIXED_GROUPS, CMIC_ACCESS, CMIC_CONTROLLERS, IdentifyController,
    OAES_ACCESS_CHANGE,
};
use nvme_spec::log::ANA_GROUPS_ONLY;
use nvme_spec::{Status, SubmissionEntry, feature as id};

use crate::admin::{Admin, Phase, Pool};
use crate::ana::ACCESS_GROUPS;
use crate::namespace;
use crate::reservations::goes_to;

/// ANATT: a change is over in less than a second.
const TRANSITION_SECONDS: u8 = 1;

/// Adds to Identify Controller what a controller says that is one of several.
pub(crate) fn identify_shared(page: &mut IdentifyController) {
    page.cmic = CMIC_CONTROLLERS | CMIC_ACCESS;
    page.oaes |= OAES_ACCESS_CHANGE;
    page.anatt = TRANSITION_SECONDS;
    page.anacap = ANACAP_ALL_STATES | ANACAP_FIXED_GROUPS;
    page.anagrpmax = ACCESS_GROUPS;
    page.nanagrpid = ACCESS_GROUPS;
    // Each controller has a test of its own at a time.
    page.dsto = 0;
}

/// Features that a controller has nothing to say of where it gives no access ("ANA effects on Command Processing", of Base and of NVM).
fn is_kept_away(feature: u8) -> bool {
    matches!(feature, id::ERROR_RECOVERY | id::RESERVATION_NOTIFICATION_MASK | id::RESERVATION_PERSISTENCE)
}

impl Admin {
    /// Whether Get or Set Features of a namespace's feature may be processed where the namespace is, or for all that are attached.
    pub fn check_feature_access(&self, pool: &Pool, feature: u8, nsid: u32) -> Result<(), Status> {
        if !is_kept_away(feature) {
            return Ok(());
        }
        let attached = namespace::active(&self.namespaces).map(|active| active.nsid);
        let mut concerned = attached.filter(|&attached| goes_to(nsid, attached));
        concerned.try_for_each(|nsid| pool.shared.gate.check_access(nsid))
    }

    /// The Asymmetric Namespace Access log.
    pub fn access_log(&self, pool: &Pool, entry: &SubmissionEntry) -> Result<Vec<u8>, Status> {
        let shared = &pool.shared;
        if !shared.subsystem.is_shared() {
            return Err(Status::INVALID_LOG_PAGE.do_not_retry());
        }
        let attached: Vec<u32> = namespace::active(&self.namespaces).map(|active| active.nsid).collect();
        let groups_only = entry.cdw10 & ANA_GROUPS_ONLY != 0;
        Ok(shared.subsystem.access.of(shared.controller_id).log(&attached, groups_only))
    }

    /// Reports that access has changed.
    pub fn tell_of_access(&mut self, pool: &Pool) {
        let shared = &pool.shared;
        let wanted = self.features.async_events & OAES_ACCESS_CHANGE != 0;
        if shared.gate.access_changed.load(Ordering::SeqCst)
            && !shared.is_paused()
            && shared.gate.access_changed.swap(false, Ordering::SeqCst)
            && wanted
            && self.phase == Phase::Ready
        {
            shared.events().queue(Event::ACCESS_CHANGED);
        }
    }
}
