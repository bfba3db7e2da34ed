//! Lists of Identify: UUIDs, sizes that suit a namespace; and what a UUID Index does.

use nvme_spec::identify::{
    CTRATT_NAMESPACE_GRANULARITY, CTRATT_UUID_LIST, GranularityDescriptor, IdentifyController,
    IdentifyIndependentNamespace, IdentifyNamespace, NamespaceGranularityList, UuidEntry, UuidList, cns,
};
use nvme_spec::opcode::admin;
use nvme_spec::{Status, SubmissionEntry, feature, log};

use super::driver::{Guest, namespace};
use super::store::{Memory, managed};
use crate::ControllerConfig;

fn config() -> ControllerConfig {
    ControllerConfig::new("LISTS")
}

fn attributes(guest: &mut Guest) -> u32 {
    IdentifyController::from_bytes(&guest.identify(cns::CONTROLLER, 0).unwrap()).ctratt
}

#[test]
fn a_uuid_index_is_one_of_the_list() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 8)]);
    assert_ne!(attributes(&mut guest) & CTRATT_UUID_LIST, 0);
    let list = UuidList::from_bytes(&guest.identify(cns::UUIDS, 0).unwrap());
    assert_eq!(list.entries[0].header, 0);
    // Version 4, of the variant of RFC 4122.
    assert_eq!((list.entries[0].uuid[6] >> 4, list.entries[0].uuid[8] >> 6), (4, 2));
    assert!(list.entries[1..].iter().all(|entry| *entry == UuidEntry::default()), "the list ends");
    let page = guest.pages(1);
    let smart = u32::from(log::id::SMART) | 127 << 16;
    let commands = [
        (admin::IDENTIFY, u32::from(cns::CONTROLLER)),
        (admin::GET_LOG_PAGE, smart),
        (admin::GET_FEATURES, u32::from(feature::ARBITRATION)),
        (admin::SET_FEATURES, u32::from(feature::ARBITRATION)),
    ];
    for (opcode, cdw10) in commands {
        for (index, expected) in [(0, Ok(())), (1, Ok(())), (2, Err(Status::INVALID_FIELD))] {
            let entry =
                SubmissionEntry { opcode, prp1: page, cdw10, cdw14: index, ..SubmissionEntry::default() };
            assert_eq!(guest.admin(entry).map(drop), expected, "{opcode:#x}, index {index}");
        }
    }
    // The effects log names the same commands.
    let effects: [u8; 4096] = guest
        .admin_data(SubmissionEntry {
            opcode: admin::GET_LOG_PAGE,
            cdw10: u32::from(log::id::COMMANDS_SUPPORTED) | 1023 << 16,
            ..SubmissionEntry::default()
        })
        .unwrap();
    for opcode in 0..=255u8 {
        let place = usize::from(opcode) * 4;
        let selects = effects[place + 2] & 1 << 3 != 0;
        assert_eq!(selects, commands.iter().any(|(known, _)| *known == opcode), "{opcode:#x}");
    }
}

#[test]
fn granularity_is_told_where_namespaces_can_be_created() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 8)]);
    assert_eq!(attributes(&mut guest) & CTRATT_NAMESPACE_GRANULARITY, 0);
    assert_eq!(guest.identify(cns::NAMESPACE_GRANULARITY, 0), Err(Status::INVALID_FIELD));
    let mut guest = managed(&config(), &[namespace(1, 8)], &Memory::new(1 << 20));
    assert_ne!(attributes(&mut guest) & CTRATT_NAMESPACE_GRANULARITY, 0);
    let page = guest.identify(cns::NAMESPACE_GRANULARITY, 0).unwrap();
    let list = NamespaceGranularityList::from_bytes(&page);
    assert_eq!((list.attributes, list.descriptor_count), (0, 0), "one, for all formats");
    assert_eq!(list.descriptors[0], GranularityDescriptor { nsze_bytes: 4096, ncap_bytes: 4096 });
    assert_eq!(page[32..40], 4096_u64.to_le_bytes());
}

#[test]
fn both_pages_of_a_namespace_say_the_same() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 8)]);
    let page = IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, 1).unwrap());
    let independent = guest.identify(cns::INDEPENDENT_NAMESPACE, 1).unwrap();
    let independent = IdentifyIndependentNamespace::from_bytes(&independent);
    assert_eq!(
        (independent.nmic, independent.rescap, independent.fpi, independent.anagrpid, independent.nsattr),
        (page.nmic, page.rescap, page.fpi, page.anagrpid, page.nsattr)
    );
}
