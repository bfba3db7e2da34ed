//! The files of images, for a process of the same host.
//!
//! Both sides have been given names of the images, and the hello has shown that they lead to the same files ([`Description`]'s
//! identities). From there until the guest is handed over names can change: somebody moves a file, puts another in its place, or mounts
//! something over its folder. So the source passes the very files that it holds, as descriptors through which nobody reads, writes or
//! locks, and the destination opens those when the guest is offered to it, instead of walking its names again.
//!
//! Which files a process may write, its own user says and no peer. So the destination takes what its own names lead to as well, and nothing
//! else: a name that leads nowhere there has the hello refused, and a file that is not the same ends the attempt with both
//! names, while the guest runs on. What the destination's machine has no use for is closed, and what did not come (the guest may create
//! namespaces meanwhile) is opened by its name.
//!
//! Each message is answered before the next, so that no more descriptors are on their way than one can carry; there are at most as many as
//! the destination's own files need, and one more.
//!
//! [`Description`]: crate::Description

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use transport::DESCRIPTORS_MAX;

use crate::link::{Link, Step};
use crate::protocol::{ImageFiles, Message};
use crate::source::unexpected;
use crate::{DestinationMachine, Error, ImageFile, SourceMachine};

/// What a source passes: as many names as descriptors.
#[derive(Debug, Default)]
pub(crate) struct Images {
    names: Vec<String>,
    descriptors: Vec<OwnedFd>,
}

impl Images {
    /// Those of `machine`. Whatever is in the way of it, they can be opened by their names.
    pub fn of(machine: &mut dyn SourceMachine) -> Self {
        match machine.image_files().map_err(Error::machine("pass the files of images on")) {
            Ok(files) => {
                let (names, descriptors) =
                    files.into_iter().map(|ImageFile { name, descriptor }| (name, descriptor)).unzip();
                Self { names, descriptors }
            }
            Err(error) => {
                log::warn!("{}: the destination opens them by their names", error.chain());
                Self::default()
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Lets the destination identify all of them.
    pub fn pass<'a>(&self, link: &mut Link, step: impl Fn(&'static str) -> Step<'a>) -> Result<(), Error> {
        let mut left = self.names.len();
        let messages = self.names.chunks(DESCRIPTORS_MAX).zip(self.descriptors.chunks(DESCRIPTORS_MAX));
        for (names, descriptors) in messages {
            left -= names.len();
            let files = ImageFiles::new(names, left > 0);
            link.send_with(&Message::ImageFiles(files), descriptors, step("passing the files of images"))?;
            let doing = "waiting for the destination to identify the images";
            match link.receive(step(doing))? {
                Message::Identified => {}
                other => return Err(unexpected(other, doing)),
            }
        }
        Ok(())
    }
}

/// Takes the files that the source passes.
pub(crate) fn receive(
    machine: &mut dyn DestinationMachine,
    link: &mut Link,
    step: Step<'_>,
    unexpected: fn(Message, &'static str) -> Error,
) -> Result<(), Error> {
    let doing = step.doing;
    let refuse = |reason| Err(Error::Protocol { doing, reason });
    let mut missing: BTreeSet<_> = machine.image_files().into_iter().flatten().collect();
    for _ in 0..=missing.len().div_ceil(DESCRIPTORS_MAX) {
        let (message, descriptors) = link.receive_with(DESCRIPTORS_MAX, step)?;
        let Message::ImageFiles(files) = message else { return Err(unexpected(message, doing)) };
        let (names, came) = (files.iter().count(), descriptors.len());
        if names != came {
            return refuse(format!("{came} descriptors came for {names} files"));
        }
        let wanted = files.iter().zip(descriptors).filter(|(name, _)| missing.remove(name));
        let wanted: Vec<_> = wanted.map(|(name, descriptor)| ImageFile { name, descriptor }).collect();
        machine.adopt_image_files(wanted).map_err(Error::machine("take the files of images"))?;
        link.send(&Message::Identified, Step { doing: "saying that the images are identified", ..step })?;
        if !files.more {
            for name in missing {
                log::info!("{name} did not come: it is opened by its name in the file system");
            }
            return Ok(());
        }
    }
    refuse("more files of images came than this machine has".to_owned())
}
