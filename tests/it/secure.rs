//! Links that are secure, links that are not, and peers that do not trust each other.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use certificates::{Authority, Validity};
use exerciser::report::Counters;
use ferry::control::FerryOwnership;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};
use support::{TestBed, Vm, WATCHDOG};

use crate::guest::{BUSY, EXERCISER, bed, many_disks, one_disk};
use crate::load::{arrives, two_rounds_with, works};

const NAMES: &[&str] = &["localhost", "127.0.0.1"];

/// A folder of credentials.
fn folder(bed: &TestBed, authority: &Authority, name: &str, validity: Validity) -> PathBuf {
    let path = bed.path(name);
    authority.fill(&path, NAMES, validity);
    path
}

/// The arguments of `migrate`.
fn secure(uri: &str, folder: &PathBuf) -> Value {
    json!({ "uri": uri, "x-ferry-tls-dir": folder })
}

/// Waits until `vm` has said this.
fn says(vm: &Vm, words: &str) {
    let found = vm.process.log.wait_for(0, WATCHDOG, |line| line.contains(words).then_some(()));
    assert!(found.is_some(), "{}", vm.process.describe(&format!("no word of {words:?} from")));
}

#[test]
fn a_busy_guest_moves_over_tls() {
    let bed = bed();
    let machine = many_disks(&bed);
    let authority = Authority::new("one for all");
    let [here, there] = ["here", "there"].map(|name| folder(&bed, &authority, name, Validity::Valid));
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let waiting = machine.flag("--tls-dir", there.display().to_string());
    let mut destination = waiting.expect(&bed, "destination", "tcp:127.0.0.1:0");
    let before = works(&mut source, &Counters::default());
    two_rounds_with(&mut source, secure(destination.uri(), &here), 32 << 20);
    source.migrated();
    assert_eq!(source.status().ownership, FerryOwnership::GivenAway);
    arrives(&mut destination, &before);
    destination.finish();
}

/// One after the other, at a destination that goes on listening.
#[test]
fn peers_that_do_not_trust_each_other_both_say_why() {
    let bed = bed();
    let machine = one_disk(&bed);
    let (ours, stranger) = (Authority::new("ours"), Authority::new("a stranger"));
    let here = folder(&bed, &ours, "here", Validity::Valid);
    let there = folder(&bed, &ours, "there", Validity::Valid);
    let strange = folder(&bed, &stranger, "strange", Validity::Valid);
    let old = folder(&bed, &ours, "old", Validity::Expired);
    // It believes ours, but shows a certificate of the stranger.
    let unknown = folder(&bed, &ours, "unknown", Validity::Valid);
    for file in ["cert.pem", "key.pem"] {
        std::fs::copy(strange.join(file), unknown.join(file)).expect("a file can be copied");
    }
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let waiting = machine.clone().flag("--tls-dir", there.display().to_string());
    let mut destination = waiting.expect(&bed, "destination", "tcp:127.0.0.1:0");
    let uri = destination.uri().to_owned();
    for (target, source_says, destination_says) in [
        (
            secure(&uri, &strange),
            "its certificate was not signed by an authority of our ca.pem",
            "it refused our certificate, which was not signed by an authority of its ca.pem",
        ),
        (
            secure(&uri, &unknown),
            "it refused our certificate, which was not signed by an authority of its ca.pem",
            "its certificate was not signed by an authority of our ca.pem",
        ),
        (
            secure(&uri, &old),
            "it refused our certificate, which has expired or is not valid yet",
            "its certificate has expired",
        ),
        (
            json!({ "uri": uri }),
            "the other side speaks TLS, and this one was given no --tls-dir",
            "it speaks plain text: it was given no --tls-dir",
        ),
    ] {
        source.migrate_with(target);
        let reason = source.not_migrated();
        assert!(reason.contains(source_says) && !reason.contains('\n'), "{reason}");
        says(&destination, destination_says);
        assert!(source.owns_a_running_guest());
    }

    let mut plain = machine.expect(&bed, "plain", "tcp:127.0.0.1:0");
    source.migrate_with(secure(plain.uri(), &here));
    let reason = source.not_migrated();
    assert!(reason.contains("it speaks plain text: it was given no --tls-dir"), "{reason}");
    says(&plain, "the other side speaks TLS, and this one was given no --tls-dir");
    plain.execute("quit", json!({}));
    assert_eq!(plain.exit().code(), Some(0));

    let missing = bed.path("missing");
    let reason = source.refused("migrate", secure(&uri, &missing));
    assert!(reason.contains("ca.pem: No such file"), "{reason}");

    let file = format!("file:{}", bed.path("file").display());
    let reason = source.refused("migrate", secure(&file, &here));
    assert!(reason.contains("is a file, and no link"), "{reason}");

    let before = works(&mut source, &Counters::default());
    source.migrate_with(secure(&uri, &here));
    source.migrated();
    arrives(&mut destination, &before);
    destination.finish();
}

/// Whatever interfaces this host has: an address for all of them is no loopback address, and can be reached.
#[test]
fn another_host_is_reached_in_plain_text_only_if_the_user_says_so() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let api = bed.path("refused.api").display().to_string();
    let flags = ["run", "--api", &api, "--incoming", "tcp:0.0.0.0:0"].map(str::to_owned);
    let mut refused = bed.ferry("refused", &[&flags, machine.flags()].concat());
    assert_eq!(refused.wait(WATCHDOG).expect("it ends").code(), Some(1));
    let says_why = |line: &str| line.contains("needs TLS (--tls-dir), or --insecure").then_some(());
    refused.log.wait_for(0, WATCHDOG, says_why).expect("it says why");

    let mut destination = machine.clone().switch("--insecure").expect(&bed, "destination", "tcp:0.0.0.0:0");
    says(&destination, "is not secure");
    let uri = destination.uri().to_owned();
    source.migrate(&uri);
    let reason = source.not_migrated();
    assert!(reason.contains("needs TLS (--tls-dir), or --insecure"), "{reason}");

    let before = works(&mut source, &Counters::default());
    let api = bed.path("source.api").display().to_string();
    let mut client = bed.ferry("client", &["migrate", "--api", &api, "--insecure", &uri].map(str::to_owned));
    assert_eq!(client.wait(WATCHDOG).expect("it ends").code(), Some(0));
    says(&source, "is not secure");
    arrives(&mut destination, &before);
    destination.finish();
}

/// A socket that outlives the execve(2) of the next process; its number there.
fn pass(socket: &impl AsFd) -> String {
    fcntl_setfd(socket, FdFlags::empty()).expect("it is ours");
    format!("fd:{}", socket.as_fd().as_raw_fd())
}

#[test]
fn a_guest_moves_over_sockets_that_were_passed() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, BUSY);
    let mut done = works(&mut source, &Counters::default());

    // A connected pair: one end is inherited, the other passed by a client.
    let (near, far) = UnixStream::pair().expect("a pair of sockets");
    let mut second = machine.expect(&bed, "second", &pass(&far));
    drop(far);
    source.client().give(&near, "way").expect("it takes a socket");
    drop(near);
    source.migrate("fd:way");
    source.migrated();
    done = arrives(&mut second, &done);

    // A listening one, and one that `ferry migrate` inherits and passes on.
    let path = bed.path("listens");
    let listener = UnixListener::bind(&path).expect("a listening socket");
    let mut third = machine.expect(&bed, "third", &pass(&listener));
    drop(listener);
    let connected = UnixStream::connect(&path).expect("it listens");
    let api = bed.path("second.api").display().to_string();
    let mut client = bed.ferry("client", &["migrate", "--api", &api, &pass(&connected)].map(str::to_owned));
    drop(connected);
    assert_eq!(client.wait(WATCHDOG).expect("it ends").code(), Some(0));
    arrives(&mut third, &done);
    third.finish();
}
