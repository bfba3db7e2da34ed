//! The lease of a guest that goes with its images: one record at each end, each beside its own images, and none that both see.
//!
//! ```text
//! source       owned ----mark-moved----> moved ----take-back----> owned      (generation + 1)
//! destination  nothing, or a record that nobody holds --attend, expect--> incoming ----take----> taken
//!                 ^------------------------------------- forget | restore | expect_again --'
//! ```
//! `moved` is written before the first byte of COMMIT, `taken` before the guest runs, each by one write that is whole or never
//! happened. So whatever is cut off at whatever moment: a record that lets a guest start lies at one end at most. Between the two
//! writes it lies at neither, and only who knows both ends can tell; that is the operator's word, to a source that lives
//! ([`Word`](crate::Word)), or by [`Lease::claim_stale`] to one that does not.

use std::io;
use std::path::PathBuf;

use nix::libc;

use super::rules::{self, Ruling};
use super::{Error, Id, Lease, PRESENCE_RANGE, Record, State};

/// What keeps a guest that is not here from being started.
pub(super) fn refusal(path: PathBuf, record: Box<Record>) -> Error {
    match record.is_in_file() {
        true => Error::Suspended { path, record },
        false => Error::WithoutGuest { path, record },
    }
}

/// What a destination does, in errors.
const EXPECT: &str = "receive images where those of a guest are";

impl Lease {
    /// Source, before the first byte of COMMIT: the images beside the record are stale, or will be. Safe to call again.
    ///
    /// # Errors
    /// [`Error::Moved`]: the guest is not ours to give. Others: the record may say it all the same.
    pub fn mark_moved(&mut self, session: &Id, peer: &str) -> Result<(), Error> {
        let me = self.owner.id;
        self.rewrite("mark its images as moved", |record| rules::mark_moved(record, &me, session, peer))
    }

    /// Source: the destination never will run the guest of `session`, which is ours as before. Harmless if it never said otherwise.
    ///
    /// # Errors
    /// [`Error::Moved`]: someone else wrote it. Others: the record may still say that the images have moved.
    pub fn take_back(&mut self, session: &Id) -> Result<(), Error> {
        let me = self.owner.id;
        self.rewrite("take the images back", |record| rules::take_back(record, &me, session))
    }

    /// Source: the guest stands still here and is to go on. Its images, if they could not be taken back when it came back, are now.
    /// Harmless if they were, and only for who knows that it is here.
    ///
    /// # Errors
    /// As [`take_back`](Self::take_back).
    pub fn take_back_what_moved(&mut self) -> Result<(), Error> {
        let record = self.read()?;
        match record.as_ref().and_then(|record| rules::moved_by(record, &self.owner.id)) {
            Some(session) => self.take_back(session),
            None => Ok(()),
        }
    }

    /// Writes what `rule` says of the record, if it is to say something else.
    fn rewrite(&self, action: &str, rule: impl FnOnce(&Record) -> Ruling) -> Result<(), Error> {
        let mut locked = self.locked()?;
        let record = locked.current(action)?;
        match rule(&record) {
            Ruling::Write(change) => locked.write(record.lease, change.generation, change.state),
            Ruling::Stays => Ok(()),
            Ruling::Refused => Err(locked.moved(action, record)),
        }
    }

    /// At the start of a VM whose guest has gone elsewhere with its images: makes us the owner all the same. Who does that knows that
    /// it does not run there.
    ///
    /// # Errors
    /// As [`claim`](Self::claim), but for images that have moved.
    pub fn claim_stale(&mut self) -> Result<(u64, Option<Record>), Error> {
        self.claim_unless(|record| record.is_in_file() || matches!(record.state, State::Incoming { .. }))
    }

    /// Destination, before it is known whether a guest fits: nobody starts what is beside the record from now on, which says what it said.
    /// `replace` and what is returned are as with [`expect`](Self::expect), which may follow.
    ///
    /// # Errors
    /// As [`expect`](Self::expect).
    pub fn attend(&mut self, replace: bool) -> Result<Option<Record>, Error> {
        let before = {
            let locked = self.locked()?;
            let before = self.be_alone(&locked, EXPECT, |record| rules::may_expect(record, replace))?;
            self.lock(libc::F_RDLCK, PRESENCE_RANGE)?;
            before
        };
        self.present = true;
        Ok(before)
    }

    /// Destination, before anything is written to an image: what is beside the record is nobody's from now on. `replace` says that a
    /// guest may be given up for it whose record this is; without, there must be none, or one that never came to be a guest. Returns
    /// the generation to [take](Self::take), and what the record said.
    ///
    /// # Errors
    /// [`Error::Held`]; [`Error::Moved`]: there is a guest.
    pub fn expect(&mut self, session: &Id, replace: bool) -> Result<(u64, Option<Record>), Error> {
        let incoming = State::Incoming { session: *session };
        self.claim_as(incoming, EXPECT, |record| rules::may_expect(record, replace))
    }

    /// Destination: it was taken, or may have been, but nothing ran and nothing ever will.
    ///
    /// # Errors
    /// The record may still say that the guest is ours.
    pub fn expect_again(&mut self, session: &Id) -> Result<(), Error> {
        let me = self.owner.id;
        let action = "give up the images of a guest that did not come";
        self.rewrite(action, |record| rules::expect_again(record, &me, session))?;
        self.leave()
    }

    /// Destination: nothing came, and what was there before is as it was. Its record `before` is in force again.
    ///
    /// # Errors
    /// It still says that a guest is to come.
    pub fn restore(&mut self, session: &Id, before: Record) -> Result<(), Error> {
        let action = "leave what was there before";
        {
            let mut locked = self.locked()?;
            let record = locked.current(action)?;
            if !rules::is_incoming(&record, &self.owner.id, session) {
                return Err(locked.moved(action, record));
            }
            locked.write_record(before)?;
        }
        self.leave()
    }

    /// Whether the record says that the images of `session` are nobody's, because of us.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn is_expecting(&self, session: &Id) -> Result<bool, Error> {
        let record = self.read()?;
        Ok(record.is_some_and(|record| rules::is_incoming(&record, &self.owner.id, session)))
    }

    /// Removes a file that was made for nothing: nobody has ever written a record there, and nobody is about to.
    pub fn forget_blank(self) {
        if let Ok(locked) = self.locked()
            && locked.newest.is_none()
            && let Ok(true) = self.lock(libc::F_WRLCK, PRESENCE_RANGE)
        {
            let _it_says_nothing = std::fs::remove_file(&self.path);
        }
    }

    /// Destination: nothing came, and the images are gone. Removes the record, if it is still ours.
    ///
    /// # Errors
    /// It stays.
    pub fn forget(self, session: &Id) -> Result<(), Error> {
        let locked = self.locked()?;
        let record = locked.current("remove it")?;
        if !rules::is_incoming(&record, &self.owner.id, session) {
            return Err(locked.moved("remove it", record));
        }
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.io("remove it", error)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NotTaken, Owner};
    use super::*;

    const SESSION: Id = [3; 16];

    struct Hosts {
        folder: tempfile::TempDir,
    }

    impl Hosts {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap() }
        }

        fn lease(&self, host: &str) -> Lease {
            Lease::open(&self.folder.path().join(host), Owner::this_process(host).unwrap()).unwrap()
        }

        /// Whether a guest would start there once nobody lives any more.
        fn starts(&self, host: &str) -> bool {
            let path = self.folder.path().join(host);
            // The power is back: no lock of before is there.
            let copy = self.folder.path().join("after");
            std::fs::copy(path, &copy).unwrap();
            let mut lease = Lease::open(&copy, Owner::this_process("later").unwrap()).unwrap();
            lease.claim().is_ok()
        }

        fn starting(&self) -> Vec<&'static str> {
            ["source", "destination"].into_iter().filter(|host| self.starts(host)).collect()
        }
    }

    #[test]
    fn whenever_the_power_is_cut_one_end_at_most_starts_the_guest_and_neither_only_during_the_hand_over() {
        let hosts = Hosts::new();
        let (mut source, mut destination) = (hosts.lease("source"), hosts.lease("destination"));
        source.claim().unwrap();
        let (generation, before) = destination.expect(&SESSION, false).unwrap();
        assert_eq!(before, None);
        assert_eq!(hosts.starting(), ["source"], "images come");
        source.mark_moved(&SESSION, "there").unwrap();
        source.mark_moved(&SESSION, "there").unwrap();
        assert!(hosts.starting().is_empty(), "COMMIT is on its way");
        destination.take(&SESSION, generation, || Ok(())).unwrap();
        assert_eq!(hosts.starting(), ["destination"], "it arrived");
        assert!(matches!(source.take_back(&[4; 16]), Err(Error::Moved { .. })));
        drop(destination);
        assert_eq!(hosts.starting(), ["destination"]);
    }

    #[test]
    fn a_guest_that_was_not_taken_starts_at_its_source() {
        let hosts = Hosts::new();
        let (mut source, mut destination) = (hosts.lease("source"), hosts.lease("destination"));
        let (first, _) = source.claim().unwrap();
        source.take_back(&SESSION).unwrap();
        let (generation, _) = destination.expect(&SESSION, false).unwrap();
        source.mark_moved(&SESSION, "there").unwrap();
        let refused = destination.take(&SESSION, generation, || Err("a disk is gone".to_owned()));
        assert!(matches!(refused, Err(NotTaken::Refused(Error::Condition { .. }))));
        destination.expect_again(&SESSION).unwrap();
        assert!(hosts.starting().is_empty());
        source.take_back(&SESSION).unwrap();
        assert_eq!(hosts.starting(), ["source"]);
        assert_eq!(source.read().unwrap().unwrap().generation, first + 1);
        destination.forget(&SESSION).unwrap();
        assert!(!hosts.folder.path().join("destination").exists());
    }

    #[test]
    fn a_guest_that_stood_still_takes_back_what_it_had_marked_in_whatever_session() {
        let hosts = Hosts::new();
        let mut source = hosts.lease("source");
        source.take_back_what_moved().unwrap();
        assert_eq!(source.read().unwrap(), None, "nobody has said anything");
        source.claim().unwrap();
        source.mark_moved(&SESSION, "there").unwrap();
        let mut stranger = hosts.lease("source");
        stranger.take_back_what_moved().unwrap();
        assert!(!hosts.starts("source"), "it was not the stranger's guest");
        source.take_back_what_moved().unwrap();
        assert!(hosts.starts("source"));
        source.offer(&SESSION, "there").unwrap();
        source.take_back_what_moved().unwrap();
        assert!(matches!(source.read().unwrap().unwrap().state, State::Offered { .. }), "both sides decide");
    }

    #[test]
    fn what_was_taken_and_never_ran_is_given_up_before_the_source_may_have_it() {
        let hosts = Hosts::new();
        let mut destination = hosts.lease("destination");
        let (generation, _) = destination.expect(&SESSION, false).unwrap();
        destination.take(&SESSION, generation, || Ok(())).unwrap();
        destination.expect_again(&SESSION).unwrap();
        assert!(!hosts.starts("destination"));
        assert!(matches!(destination.take(&[9; 16], generation, || Ok(())), Err(NotTaken::Refused(_))));
    }

    /// Whoever opened it for nothing leaves nothing, and nothing that somebody has said is lost.
    #[test]
    fn only_a_file_in_which_nothing_was_ever_said_is_forgotten() {
        let hosts = Hosts::new();
        let path = hosts.folder.path().join("destination");
        let blank = hosts.lease("destination");
        assert!(path.exists());
        blank.forget_blank();
        assert!(!path.exists());

        let mut said = hosts.lease("destination");
        said.expect(&SESSION, false).unwrap();
        let record = said.read().unwrap();
        assert!(record.is_some());
        hosts.lease("destination").forget_blank();
        assert_eq!(said.read().unwrap(), record);
        said.forget(&SESSION).unwrap();
        assert!(!path.exists());
    }

    /// Two came at the same time, and the first has removed the file that the second has open.
    #[test]
    fn what_is_said_in_a_file_that_is_removed_is_said_to_nobody_and_fails() {
        let hosts = Hosts::new();
        let path = hosts.folder.path().join("destination");
        let mut late = hosts.lease("destination");
        hosts.lease("destination").forget_blank();
        let said = [late.expect(&SESSION, true).map(drop), late.claim().map(drop), late.read().map(drop)];
        for error in said.map(Result::unwrap_err) {
            let Error::Io { source, .. } = &error else { panic!("{error:?}") };
            assert!(source.to_string().contains("it was removed meanwhile"), "{error}");
        }
        late.forget_blank();
        assert!(!path.exists());
        hosts.lease("destination").expect(&SESSION, false).unwrap();
    }

    #[test]
    fn who_attends_keeps_others_out_and_changes_nothing() {
        let hosts = Hosts::new();
        let contents = || std::fs::read(hosts.folder.path().join("destination")).unwrap();
        let mut guest = hosts.lease("destination");
        guest.claim().unwrap();
        assert!(matches!(hosts.lease("destination").attend(true), Err(Error::Held { .. })), "it runs");
        guest.release().unwrap();
        drop(guest);
        let before = contents();
        assert!(matches!(hosts.lease("destination").attend(false), Err(Error::Moved { .. })), "it was one");
        let mut attending = hosts.lease("destination");
        assert_eq!(attending.attend(true).unwrap().unwrap().state, State::Released);
        for error in
            [hosts.lease("destination").claim().map(drop), hosts.lease("destination").attend(true).map(drop)]
        {
            assert!(matches!(error, Err(Error::Held { .. })), "{error:?}");
        }
        assert_eq!(contents(), before);
        assert!(hosts.starts("destination"), "the power is cut");
        let (generation, _) = attending.expect(&SESSION, true).unwrap();
        assert!(!hosts.starts("destination"));
        attending.take(&SESSION, generation, || Ok(())).unwrap();
        drop(attending);

        let mut attending = hosts.lease("other");
        assert_eq!(attending.attend(false).unwrap(), None);
        assert!(hosts.lease("other").attend(true).is_err());
        hosts.lease("other").forget_blank();
        attending.expect(&SESSION, false).unwrap();
        attending.forget(&SESSION).unwrap();
        let mut attending = hosts.lease("other");
        attending.attend(false).unwrap();
        attending.forget_blank();
        assert!(!hosts.folder.path().join("other").exists());
    }

    #[test]
    fn stale_and_unfinished_images_are_refused_and_only_the_stale_ones_by_force_not() {
        let hosts = Hosts::new();
        let mut moved = hosts.lease("source");
        moved.claim().unwrap();
        moved.mark_moved(&SESSION, "there").unwrap();
        drop(moved);
        let mut again = hosts.lease("source");
        for error in [again.check_claim(), again.claim().map(drop), again.claim_anew().map(drop)] {
            let error = error.unwrap_err();
            assert!(matches!(error, Error::WithoutGuest { .. }), "{error}");
            assert!(error.to_string().contains("moved to there in session 0303"), "{error}");
        }
        let other = hosts.lease("source").expect(&[5; 16], false).unwrap_err();
        assert!(matches!(other, Error::Moved { .. }), "{other}");
        again.claim_stale().unwrap();
        drop(again);

        let mut unfinished = hosts.lease("destination");
        unfinished.expect(&SESSION, false).unwrap();
        let held = hosts.lease("destination").expect(&[5; 16], true).unwrap_err();
        assert!(matches!(held, Error::Held { .. }), "{held}");
        drop(unfinished);
        let mut again = hosts.lease("destination");
        for error in [again.check_claim(), again.claim().map(drop), again.claim_stale().map(drop)] {
            assert!(error.unwrap_err().to_string().contains("incoming in session 0303"));
        }
        again.expect(&[5; 16], false).unwrap();
    }
}
