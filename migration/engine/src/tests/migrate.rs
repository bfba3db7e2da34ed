//! What must go well, and what must be refused.

use super::mock::{Trouble, World};
use super::{Ending, Play};
use crate::lease::State;
use crate::{Error, Outcome, RunState, Status};

/// The guest runs at the destination with the RAM and the device that it had.
fn assert_moved(world: &World, ending: &Ending) {
    let Some((Outcome::Completed { note: None }, source)) = &ending.source else {
        panic!("{:?}\n{:#?}", ending.source.as_ref().map(|(outcome, _)| outcome), world.log());
    };
    let arrived = ending.arrived.as_ref().unwrap();
    assert!(source.finished && arrived.acknowledged && arrived.error.is_none());
    assert!(source.guest.contents() == arrived.machine.0.contents(), "RAM differs");
    assert_eq!(source.guest.device, arrived.machine.0.device);
    world.assert_sound("moved");
}

#[test]
fn a_running_guest_moves_with_all_it_wrote() {
    let world = World::new();
    let ending = Play::new(&world).run();
    assert_moved(&world, &ending);
    assert_eq!(world.running(), ["destination"]);
    assert_eq!(world.image_holder().as_deref(), Some("destination"));
    let record = world.lease("reader").read().unwrap().unwrap();
    assert_eq!((record.generation, record.owner.vm.as_str()), (2, "destination"));
    assert!(matches!(record.state, State::Taken { .. }));

    let (source, destination) = (&ending.source_statistics, &ending.destination_statistics);
    assert_eq!((source.status, destination.status), (Status::Completed, Status::Completed));
    assert!(source.rounds >= 2, "{source:?}");
    assert!(source.zero_pages > 0 && source.normal_pages > 300);
    assert_eq!(source.total_bytes, 640 * 4096);
    // Holes were not read: less than all of it travelled in the first round.
    assert!(source.transferred_bytes < 640 * 4096, "{}", source.transferred_bytes);
    assert_eq!(destination.downtime, source.downtime, "both sides tell the same figures");
    assert!(!source.downtime.total.is_zero());
}
