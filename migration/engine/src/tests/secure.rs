//! Migrations over TLS: what holds of a link holds of a secure one, and whoever is not believed is no peer.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use certificates::{Authority, Validity};
use transport::faulty::{self, Fault, Witness};
use transport::{Connection, Credentials, Endpoint, Listener, Security};

use super::mock::{Factory, Source, World};
use super::{impatience, patience, patiently};
use crate::{Context, Destination, Error, Outcome, Parameters, Patience, Statistics, migrate};

/// More messages than a source ever sends.
const MESSAGES_MAX: u32 = 40;

pub fn trusting(authority: &Authority, folder: &Path) -> Security {
    authority.fill(folder, &["127.0.0.1"], Validity::Valid);
    Security::Tls(Arc::new(Credentials::load(folder).unwrap()))
}

/// A source: its security, its patience, and a fault at a message of its first link.
type Coming = (Security, Patience, Option<(u32, Fault)>);

/// Lets sources come to one destination, one after the other, until one has brought its guest. Returns how each ended, whether its
/// fault struck, and who runs the guest then.
fn come(world: &World, destination: Security, sources: Vec<Coming>) -> (Vec<(Outcome, bool)>, Vec<String>) {
    let uri = "tcp:127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind_endpoint(&Endpoint { uri, security: destination }).unwrap();
    let (waiting, stop) = (Parameters::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let (mut lease, statistics) = (world.lease("destination"), Statistics::new());
            let mut factory = Factory::new(world, "destination");
            let mut destination =
                Destination::new(Some(&mut lease), &statistics, patience(), &waiting).unwrap();
            let mut arrived = destination.receive(&mut factory, &listener).unwrap();
            if let Some(arrived) = &mut arrived {
                destination.answer(arrived, &listener, &stop).unwrap();
            }
            (arrived, lease)
        });
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        let mut source = Source::new(world, "source");
        let outcomes = sources.into_iter().map(|(security, patience, mut fault)| {
            let endpoint = Endpoint { uri: listener.uri().clone(), security };
            let mut witness: Option<Witness> = None;
            let mut dial = || -> Result<Connection, Error> {
                let connection = endpoint.connect(patience.connect)?;
                let Some((at, fault)) = fault.take() else { return Ok(connection) };
                let (connection, new) = faulty::wrap(connection, at, fault);
                witness = Some(new);
                Ok(connection)
            };
            let (parameters, statistics) = (Parameters::new(), Statistics::new());
            let mut context = Context {
                lease: Some(&mut lease),
                parameters: &parameters,
                statistics: &statistics,
                patience,
            };
            let outcome = migrate(&mut source, &mut dial, &mut context);
            (outcome, witness.is_none_or(|witness| witness.struck()))
        });
        let outcomes = outcomes.collect();
        waiting.cancel();
        stop.store(true, Ordering::SeqCst);
        // Leases and machines live until it is known who runs.
        let _arrived = receiving.join().unwrap();
        (outcomes, world.running())
    })
}

#[test]
fn a_secure_link_that_is_cut_anywhere_leaves_one_guest() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("one for both");
    let [source, destination] =
        ["source", "destination"].map(|name| trusting(&authority, &folder.path().join(name)));
    type New = fn() -> Fault;
    let faults: [New; 3] = [|| Fault::CutMiddle, || Fault::CutAfter, || Fault::Deafen];
    for fault in faults {
        let mut completed = 0;
        for at in 0..=MESSAGES_MAX {
            assert!(at < MESSAGES_MAX, "too many messages");
            let patience = if matches!(fault(), Fault::Deafen) { impatience() } else { patience() };
            let (world, running, outcome, struck) = patiently(patience, |patience| {
                let world = World::new();
                let patience = Patience { build: patience.handshake, ..patience };
                let one = vec![(source.clone(), patience, Some((at, fault())))];
                let (mut outcomes, running) = come(&world, destination.clone(), one);
                let (outcome, struck) = outcomes.remove(0);
                let moved = matches!(outcome, Outcome::Completed { .. });
                (struck || moved).then_some((world, running, outcome, struck))
            });
            let what = format!("{:?} at message {at}", fault());
            world.assert_sound(&what);
            assert_eq!(running.len(), 1, "{what}: {running:?}\n{:#?}", world.log());
            let arrived = running == ["destination"];
            assert_eq!(matches!(outcome, Outcome::Completed { .. }), arrived, "{what}: {outcome:?}");
            completed += u32::from(arrived);
            if !struck {
                assert!(at > 3 && arrived, "{what}");
                break;
            }
        }
        // A COMMIT that arrived is answered on another link, which is as secure.
        assert!(completed >= 2, "{completed} guests arrived");
    }
}

#[test]
fn whoever_is_not_believed_keeps_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, stranger) = (Authority::new("ours"), Authority::new("a stranger"));
    let path = |name: &str| folder.path().join(name);
    let source = trusting(&ours, &path("source"));
    let destination = trusting(&ours, &path("destination"));
    let strange = trusting(&stranger, &path("strange"));
    // It believes us, but is nobody that we know.
    trusting(&ours, &path("unknown"));
    for file in ["cert.pem", "key.pem"] {
        std::fs::copy(path("strange").join(file), path("unknown").join(file)).unwrap();
    }
    let unknown = Security::Tls(Arc::new(Credentials::load(&path("unknown")).unwrap()));
    let world = World::new();
    let sources = [Security::ThisHost, strange, unknown, source].map(|security| (security, patience(), None));
    let (outcomes, running) = come(&world, destination, sources.into());
    let reasons = [
        "the other side speaks TLS, and this one was given no --tls-dir",
        "its certificate was not signed by an authority of our ca.pem",
        "it refused our certificate, which was not signed by an authority of its ca.pem",
    ];
    for ((outcome, _), reason) in outcomes.iter().zip(reasons) {
        let Outcome::Failed { error, paused: None } = outcome else { panic!("{outcome:?}") };
        assert!(error.chain().contains(reason), "{}", error.chain());
    }
    assert!(matches!(outcomes[3], (Outcome::Completed { .. }, _)), "{:?}", outcomes[3]);
    assert_eq!(running, ["destination"]);
}
