//! QEMU's own Python package, as scripts of QEMU's users have it.

use std::path::Path;
use std::process::Command;

use super::*;

#[test]
fn the_python_package_of_qemu_talks_to_it() {
    let setup = Setup::new();
    let support = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/qmp");
    let run = Command::new(support.join("run")).arg("session.py").arg(&setup.path).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{text}");
    assert_eq!(
        setup.machine.asked(),
        ["stop", "cont", "migrate unix:/nowhere", "migrate_cancel", "quit"],
        "{text}"
    );
    assert_eq!(
        setup.machine.migration_parameters(),
        MigrationParameters { downtime_limit: 50, max_bandwidth: 1 << 30, ..MigrationParameters::default() }
    );
}
