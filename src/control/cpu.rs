//! The guest's processor in the words of the control socket.

use serde::{Deserialize, Serialize};

/// Which processor the guest sees.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryCpu {
    /// The model that was asked for; none if the guest came from elsewhere with its processor.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub model: Option<String>,
    /// Features that CPUID tells the guest, as it was read back from KVM.
    pub features: Vec<String>,
    /// Those of them that the model hides, but this host's KVM does not.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub unmasked: Vec<String>,
    /// Features that programs of the guest see besides, since this host's KVM runs them as its own.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub user_features: Vec<String>,
}
