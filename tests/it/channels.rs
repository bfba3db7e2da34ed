//! Guest memory on connections of its own, with real guests in real processes.

use exerciser::report::Counters;
use ferry::control::FerryChannel;
use serde_json::json;

use crate::guest::{BUSY, EXERCISER, bed, many_disks};
use crate::load::moves;

#[test]
fn over_many_channels_that_compress_and_over_none() {
    let bed = bed();
    let machine = many_disks(&bed);
    let mut here = machine.boot(&bed, "process-0", EXERCISER, BUSY);
    let mut done = Counters::default();
    let cases = [(1, "none"), (4, "zstd"), (2, "lz4"), (64, "none"), (0, "none")];
    for (hop, (channels, compression)) in (1..).zip(cases) {
        let uri = format!("unix:{}", bed.path(&format!("move-{hop}")).display());
        let mut there = machine.expect(&bed, &format!("process-{hop}"), &uri);
        let parameters = json!({ "multifd-channels": channels, "multifd-compression": compression });
        here.execute("migrate-set-parameters", parameters);
        done = moves(&mut here, &mut there, &done).0;
        let migration = here.status().migration.expect("there was one");
        assert_eq!(migration.channel_bytes.len(), channels, "{migration:?}");
        let info = here.migrated();
        let ram = info.ram.expect("memory moved");
        assert_eq!(info.x_ferry_channels, migration.channels);
        assert_eq!(info.x_ferry_device_bytes, Some(migration.device_bytes));
        for (channel, bytes) in migration.channels.iter().zip(&migration.channel_bytes) {
            assert_eq!((channel.bytes, channel.bytes_per_second > 0), (*bytes, *bytes > 0), "{channel:?}");
        }
        if channels > 0 {
            let pages: u64 = migration.channels.iter().map(|channel| channel.pages).sum();
            assert_eq!(pages, ram.normal + ram.duplicate);
        }
        let arrived = there.status().migration.expect("it came");
        assert_eq!(arrived.device_bytes, migration.device_bytes);
        let carried =
            |channels: &[FerryChannel]| channels.iter().map(|one| (one.bytes, one.pages)).collect::<Vec<_>>();
        assert_eq!(carried(&arrived.channels), carried(&migration.channels));
        assert_eq!(migration.compressed_pages > 0, compression != "none", "{migration:?}");
        here.execute("quit", json!({}));
        assert_eq!(here.exit().code(), Some(0));
        here = there;
    }
    here.finish();
}
