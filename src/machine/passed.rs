//! Memory that another process of this host passes on: what each block may be.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, ensure};

use super::Resources;
use crate::memory::PassedKind;

impl Resources {
    /// Maps memory of a guest that is still another process's, for reading: one descriptor for each block, in their order.
    ///
    /// # Errors
    /// One is not what its block can be; says which.
    pub fn map_passed(&self, passed: Vec<OwnedFd>) -> anyhow::Result<()> {
        let blocks = self.ram().blocks();
        ensure!(passed.len() == blocks.len(), "{} descriptors for {} blocks", passed.len(), blocks.len());
        for (block, passed) in blocks.iter().zip(passed) {
            let passed = File::from(passed);
            let found = passed.metadata().with_context(|| format!("memory block {}", block.name))?;
            // The contents of a region in a shared folder: the file that it becomes here too, and as safe as that folder.
            let attached =
                self.regions().any(|region| region.block().name == block.name && region.is_at(&found));
            let kind = if attached { PassedKind::Attached } else { PassedKind::Memory };
            block.map_passed(passed.into(), kind)?;
        }
        Ok(())
    }

    /// Takes descriptors of the same memory that can write; the memory stays as it is until the guest is ours.
    ///
    /// # Errors
    /// One is of something else; says which.
    pub fn adopt_passed(&self, passed: Vec<OwnedFd>) -> anyhow::Result<()> {
        let blocks = self.ram().blocks();
        ensure!(passed.len() == blocks.len(), "{} descriptors for {} blocks", passed.len(), blocks.len());
        Ok(blocks.iter().zip(passed).try_for_each(|(block, passed)| block.adopt(passed))?)
    }
}
