//! Registers, enable, disable, shutdown, subsystem reset.

use nvme_spec::opcode::nvm;

use super::driver::{Guest, namespace, transfer};
use crate::ControllerConfig;

fn config() -> ControllerConfig {
    ControllerConfig::new("INIT")
}

#[test]
fn a_driver_initialises_and_does_io() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    let controller = nvme_spec::identify::IdentifyController::from_bytes(&guest.identify(1, 0).unwrap());
    assert_eq!(&controller.sn, b"INIT                ");
    assert_eq!(controller.nn, 1024);
    guest.create_pair(1, 16);
    let page = guest.pages(1);
    guest.write_bytes(page, &[0xa5; 512]);
    guest.io(1, transfer(nvm::WRITE, 1, 7, 1, page)).unwrap();
    let other = guest.pages(1);
    guest.clear(other, 4096);
    guest.io(1, transfer(nvm::READ, 1, 7, 1, other)).unwrap();
    assert_eq!(guest.read_bytes(other, 512), vec![0xa5; 512]);
    assert_eq!(guest.interrupts.take(1), 2, "one interrupt a completion, on the queue's vector");
    assert_eq!(guest.controller.statistics().in_flight, 0);
}
