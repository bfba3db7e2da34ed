//! What this crate itself puts into a stream, as schemas: they are part of what a release writes.

use vmstate::Schema;

use crate::{configuration, digest};

/// The configuration and the section with the digests.
pub fn schemas() -> [Schema; 2] {
    [vmstate::schema::<configuration::Wire>(), vmstate::schema::<digest::Integrity>()]
}
