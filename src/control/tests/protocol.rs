//! Shapes: what is sent for what is asked, word by word.

use serde_json::json;

use super::super::framing::Framer;
use super::*;

fn error(class: &str, description: &str) -> Value {
    json!({ "error": { "class": class, "desc": description } })
}

#[test]
fn greeting_names_the_version_and_no_capability() {
    let setup = Setup::new();
    let greeting = setup.raw().read();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    assert_eq!(greeting["QMP"]["version"]["package"], concat!("ferry-", env!("CARGO_PKG_VERSION")));
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
}

#[test]
fn nothing_but_the_handshake_before_the_handshake() {
    let setup = Setup::new();
    let mut raw = setup.raw();
    raw.read();
    let refusal = error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'");
    assert_eq!(raw.ask(r#"{"execute":"query-status"}"#), refusal);
    assert_eq!(
        raw.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#),
        error("GenericError", "Capability oob not available")
    );
    assert_eq!(raw.ask(r#"{"execute":"stop"}"#), refusal);
    assert_eq!(raw.ask(r#"{"execute":"qmp_capabilities"}"#), json!({ "return": {} }));
    assert_eq!(
        raw.ask(r#"{"execute":"qmp_capabilities"}"#),
        error("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
    );
    assert_eq!(setup.machine.asked(), Vec::<String>::new());
}

#[test]
fn malformed_requests_get_the_words_of_qemu() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    for (text, description) in [
        ("[1]", "QMP input must be a JSON object"),
        ("7\n", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        (r#"{"execute":1}"#, "QMP input member 'execute' must be a string"),
        (r#"{"execute":"stop","arguments":[]}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"stop","argument":{}}"#, "QMP input member 'argument' is unexpected"),
        (r#"{"exec-oob":"stop"}"#, "QMP input member 'exec-oob' is unexpected"),
        (r#"{"execute":"stop","arguments":{"now":true}}"#, "Parameter 'now' is unexpected"),
        (r#"{"execute":"migrate"}"#, "Parameter 'uri' is missing"),
        (
            r#"{"execute":"migrate","arguments":{"uri":7}}"#,
            "Invalid parameter type for 'uri', expected: string",
        ),
        (
            r#"{"execute":"migrate","arguments":{"uri":"unix:x","x-ferry-postcopy":"later"}}"#,
            "Parameter 'x-ferry-postcopy' does not accept value 'later': after-first-round or now",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":-1}}"#,
            "Parameter 'max-bandwidth' expects uint64",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":1.5}}"#,
            "Invalid parameter type for 'max-bandwidth', expected: integer",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":8000}}"#,
            "Parameter 'max-bandwidth' expects 0 (no limit) or at least 65536 bytes per second",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"downtime-limit":2000001}}"#,
            "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000 seconds",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"cpu-throttle-initial":100}}"#,
            "Parameter 'cpu-throttle-initial' expects an integer in the range of 1 to 99",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"max-cpu-throttle":19}}"#,
            "Parameter 'max-cpu-throttle' expects an integer in the range of cpu-throttle-initial to 99",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"throttle-trigger-threshold":0}}"#,
            "Parameter 'throttle-trigger-threshold' expects an integer in the range of 1 to 100",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"x-ferry-timeout":4294967296}}"#,
            "Parameter 'x-ferry-timeout' expects uint32",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"x-ferry-on-timeout":"wait"}}"#,
            "Parameter 'x-ferry-on-timeout' does not accept value 'wait'",
        ),
        (r#"{"execute":"migrate-set-capabilities"}"#, "Parameter 'capabilities' is missing"),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"multifd-channels":65}}"#,
            "Parameter 'multifd-channels' expects 0 (no channels of its own for memory) to 64",
        ),
        (
            r#"{"execute":"migrate-set-parameters","arguments":{"multifd-compression":"zlib"}}"#,
            "Parameter 'multifd-compression' does not accept value 'zlib'",
        ),
        (
            r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"multifd","state":true}]}}"#,
            "Parameter 'capability' does not accept value 'multifd'",
        ),
    ] {
        assert_eq!(raw.ask(text), error("GenericError", description), "{text}");
    }
    let unknown = error("CommandNotFound", "The command device_add has not been found");
    assert_eq!(raw.ask(r#"{"execute":"device_add"}"#), unknown);
    assert_eq!(setup.machine.asked(), Vec::<String>::new());
    assert_eq!(setup.machine.migration_parameters(), MigrationParameters::default());
}

#[test]
fn id_is_echoed_whatever_it_is() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    for id in [json!(1), json!("a"), json!({ "deep": [null] }), json!(null)] {
        let answer = raw.ask(&json!({ "execute": "query-status", "id": id }).to_string());
        assert_eq!(answer, json!({ "return": { "running": true, "status": "running" }, "id": id }));
        let refusal = raw.ask(&json!({ "execute": "nonsense", "id": id }).to_string());
        assert_eq!(refusal["error"]["class"], "CommandNotFound");
        assert_eq!(refusal.get("id"), Some(&id));
    }
    assert_eq!(raw.ask(r#"{"id":5}"#)["id"], 5);
}

#[test]
fn stop_and_cont_are_seen_by_every_client() {
    let setup = Setup::new();
    let (mut one, mut other) = (setup.negotiated(), setup.negotiated());
    let mut silent = setup.raw();
    silent.read();
    let event = one.ask(r#"{"execute":"stop","id":1}"#);
    assert_eq!(event["event"], "STOP");
    assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
    assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
    assert_eq!(one.read(), json!({ "return": {}, "id": 1 }));
    assert_eq!(other.read(), event);
    assert_eq!(
        other.ask(r#"{"execute":"query-status"}"#),
        json!({ "return": { "running": false, "status": "paused" } })
    );
    assert_eq!(other.ask(r#"{"execute":"cont"}"#)["event"], "RESUME");
    assert_eq!(setup.machine.asked(), ["stop", "cont"]);
    // Who has not negotiated hears nothing.
    assert_eq!(silent.ask(r#"{"execute":"qmp_capabilities"}"#), json!({ "return": {} }));
}

#[test]
fn a_refusal_is_a_generic_error() {
    let setup = Setup::new();
    setup.machine.set(|state| state.run_state = RunState::Postmigrate);
    let mut raw = setup.negotiated();
    assert_eq!(raw.ask(r#"{"execute":"cont"}"#), error("GenericError", "the guest runs elsewhere"));
    assert_eq!(raw.ask(r#"{"execute":"query-status"}"#)["return"]["status"], "postmigrate");
}

#[test]
fn what_stands_in_the_way_of_a_migration_is_told_before_one_and_with_one() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    setup.machine.set(|state| state.blockers = vec!["disk: nailed down".to_owned(), "rng: shy".to_owned()]);
    let reasons = json!(["disk: nailed down", "rng: shy"]);
    let query = r#"{"execute":"query-migrate"}"#;
    assert_eq!(raw.ask(query), json!({ "return": { "blocked-reasons": reasons } }));
    let status = raw.ask(r#"{"execute":"x-ferry-status"}"#)["return"].take();
    assert_eq!(status["blocked-reasons"], reasons);
    let info = MigrationInfo::new(MigrationStatus::Failed);
    setup.machine.set(|state| state.migration = Some(info));
    assert_eq!(raw.ask(query), json!({ "return": { "status": "failed", "blocked-reasons": reasons } }));
    // Without any nothing is said of it.
    setup.machine.set(|state| state.blockers.clear());
    assert_eq!(raw.ask(query), json!({ "return": { "status": "failed" } }));
    assert_eq!(raw.ask(r#"{"execute":"x-ferry-status"}"#)["return"].get("blocked-reasons"), None);
}

#[test]
fn migration_is_reported_in_the_shape_of_qemu() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    assert_eq!(raw.ask(r#"{"execute":"query-migrate"}"#), json!({ "return": {} }));
    // The capability is off: the answer comes without an event before it.
    let migrate = r#"{"execute":"migrate","arguments":{"uri":"unix:/x","detach":true}}"#;
    assert_eq!(raw.ask(migrate), json!({ "return": {} }));
    assert_eq!(raw.ask(r#"{"execute":"query-migrate"}"#), json!({ "return": { "status": "setup" } }));

    let on = r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}}"#;
    assert_eq!(raw.ask(on), json!({ "return": {} }));
    assert_eq!(
        raw.ask(r#"{"execute":"query-migrate-capabilities"}"#),
        json!({ "return": [
            { "capability": "events", "state": true },
            { "capability": "auto-converge", "state": false },
            { "capability": "postcopy-ram", "state": false },
        ] })
    );
    let event = raw.ask(r#"{"execute":"migrate_cancel"}"#);
    assert_eq!((&event["event"], &event["data"]), (&json!("MIGRATION"), &json!({ "status": "cancelled" })));
    assert_eq!(raw.read(), json!({ "return": {} }));

    let ram = RamStats { transferred: 5, total: 4096, mbps: 1.5, page_size: 4096, ..RamStats::default() };
    let info = MigrationInfo {
        ram: Some(ram),
        total_time: Some(12),
        setup_time: Some(1),
        downtime: Some(3),
        x_ferry_device_bytes: Some(9000),
        x_ferry_channels: vec![FerryChannel { bytes: 5, pages: 4, bytes_per_second: 3 }],
        ..MigrationInfo::new(MigrationStatus::Completed)
    };
    setup.machine.set(|state| state.migration = Some(info));
    let answer = raw.ask(r#"{"execute":"query-migrate"}"#)["return"].take();
    assert_eq!(answer["status"], "completed");
    assert_eq!((&answer["total-time"], &answer["setup-time"]), (&json!(12), &json!(1)));
    assert_eq!((&answer["downtime"], &answer["x-ferry-device-bytes"]), (&json!(3), &json!(9000)));
    assert_eq!(answer["x-ferry-channels"], json!([{ "bytes": 5, "pages": 4, "bytes-per-second": 3 }]));
    // Every member that QAPI's MigrationStats requires is there, and no other.
    let mut members: Vec<_> = answer["ram"].as_object().unwrap().keys().map(String::as_str).collect();
    members.sort_unstable();
    let mut required = [
        "transferred",
        "remaining",
        "total",
        "duplicate",
        "normal",
        "normal-bytes",
        "dirty-pages-rate",
        "mbps",
        "dirty-sync-count",
        "postcopy-requests",
        "page-size",
        "multifd-bytes",
        "pages-per-second",
        "precopy-bytes",
        "downtime-bytes",
        "postcopy-bytes",
        "dirty-sync-missed-zero-copy",
    ];
    required.sort_unstable();
    assert_eq!(members, required);
}

#[test]
fn parameters_change_one_by_one() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    let query = r#"{"execute":"query-migrate-parameters"}"#;
    let mut expected = json!({
        "downtime-limit": 300,
        "max-bandwidth": 0,
        "multifd-channels": 2,
        "multifd-compression": "none",
        "throttle-trigger-threshold": 50,
        "cpu-throttle-initial": 20,
        "cpu-throttle-increment": 10,
        "max-cpu-throttle": 99,
        "x-ferry-max-rounds": 0,
        "x-ferry-timeout": 0,
        "x-ferry-on-timeout": "cancel",
    });
    assert_eq!(raw.ask(query), json!({ "return": expected }));
    raw.ask(r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":1048576}}"#);
    raw.ask(r#"{"execute":"migrate-set-parameters","arguments":{"downtime-limit":20}}"#);
    (expected["downtime-limit"], expected["max-bandwidth"]) = (json!(20), json!(1_048_576));
    assert_eq!(raw.ask(query), json!({ "return": expected }));
    for (name, value) in [
        ("throttle-trigger-threshold", json!(100)),
        ("cpu-throttle-initial", json!(30)),
        ("cpu-throttle-increment", json!(25)),
        ("max-cpu-throttle", json!(90)),
        ("x-ferry-max-rounds", json!(7)),
        ("x-ferry-timeout", json!(60)),
        ("x-ferry-on-timeout", json!("force")),
        ("multifd-channels", json!(64)),
        ("multifd-compression", json!("lz4")),
    ] {
        let set = json!({ "execute": "migrate-set-parameters", "arguments": { name: value } });
        assert_eq!(raw.ask(&set.to_string()), json!({ "return": {} }));
        expected[name] = value;
        assert_eq!(raw.ask(query), json!({ "return": expected }));
    }
}

#[test]
fn vcpus_are_slowed_down_where_the_capability_says_so() {
    let setup = Setup::new();
    let limits = |auto_converge| Limits { auto_converge, timeout: Some(60), ..Limits::default() };
    let mut client = Client::connect(&setup.path).unwrap();
    for on in [true, false] {
        client.set_limits(&limits(Some(on))).unwrap();
        client.set_limits(&limits(None)).unwrap();
        assert_eq!(setup.machine.migration_parameters().convergence.auto_converge, on);
        let listed = client.execute("query-migrate-capabilities", json!({})).unwrap();
        assert_eq!(listed[1], json!({ "capability": "auto-converge", "state": on }));
    }
    let convergence: engine::Convergence = setup.machine.migration_parameters().convergence.into();
    let expected = engine::Convergence {
        timeout: Some(std::time::Duration::from_secs(60)),
        ..engine::Convergence::default()
    };
    assert_eq!(convergence, expected);
}

#[test]
fn every_command_is_listed() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    let answer = raw.ask(r#"{"execute":"query-commands"}"#);
    for entry in answer["return"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        if name == "qmp_capabilities" || name == "quit" {
            continue;
        }
        // With an argument that no command takes, so that none acts.
        let refusal = raw.ask(&json!({ "execute": name, "arguments": { "x": 1 } }).to_string());
        assert_eq!(refusal["error"]["class"], "GenericError", "{name}: {refusal}");
    }
    assert_eq!(setup.machine.asked(), Vec::<String>::new());
}

#[test]
fn shutdown_says_who_and_why() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    for (reason, guest, text) in [
        (ShutdownCause::HostQmpQuit, false, "host-qmp-quit"),
        (ShutdownCause::HostSignal, false, "host-signal"),
        (ShutdownCause::GuestShutdown, true, "guest-shutdown"),
        (ShutdownCause::GuestReset, true, "guest-reset"),
    ] {
        setup.events.emit(Event::Shutdown { reason });
        let event = raw.read();
        assert_eq!(event["event"], "SHUTDOWN");
        assert_eq!(event["data"], json!({ "guest": guest, "reason": text }));
    }
}

/// What the framer makes of a text.
fn frames(text: &str) -> Vec<String> {
    let mut framer = Framer::default();
    text.bytes().filter_map(|byte| framer.push(byte)).map(|bytes| String::from_utf8(bytes).unwrap()).collect()
}

#[test]
fn requests_need_no_newline_and_may_have_many() {
    assert_eq!(frames(r#"{"a":[1,{}]}{"b":2}"#), [r#"{"a":[1,{}]}"#, r#"{"b":2}"#]);
    assert_eq!(frames("  \r\n{\n \"a\":\n1}\n\n[2]"), ["{\n \"a\":\n1}", "[2]"]);
    assert_eq!(frames(r#"{"a":"}\"{["}[]"#), [r#"{"a":"}\"{["}"#, "[]"]);
    assert_eq!(frames(r#"{"a":"\\"}1 "#), [r#"{"a":"\\"}"#, "1 "]);
}

#[test]
fn text_that_is_no_json_does_not_swallow_the_next_request() {
    assert_eq!(frames("nonsense\n{}"), ["nonsense\n", "{}"]);
    assert_eq!(frames("}{}"), ["}", "{}"]);
    assert_eq!(frames("{\"lost quote}\n{}"), ["{\"lost quote}\n", "{}"]);
}

#[test]
fn namespaces_are_added_removed_and_resized_in_words_of_our_own() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    let mut ask = |command: &str, arguments: &Value| {
        raw.ask(
            &json!({ "execute": format!("x-ferry-namespace-{command}"), "arguments": arguments }).to_string(),
        )
    };
    let file = json!({ "controller": "c", "nsid": 7, "backend": "file", "path": "/a,b.raw", "ro": true });
    assert_eq!(ask("add", &file), json!({ "return": {} }));
    let which = |nsid: u32| json!({ "controller": "c", "nsid": nsid });
    assert_eq!(ask("remove", &which(7)), json!({ "return": { "released": true } }));
    assert_eq!(ask("remove", &which(9)), json!({ "return": { "released": false } }));
    let grown = json!({ "controller": "c", "nsid": 7, "size": 8192 });
    assert_eq!(ask("resize", &grown), json!({ "return": { "capacity-bytes": 8192 } }));
    assert_eq!(ask("resize", &which(7)), error("GenericError", "the image is what it was"));
    let asked = setup.machine.asked();
    assert!(
        asked[0]
            .contains(r#"controller: "c", namespace: NamespaceSpec { nsid: 7, backend: File("/a,b.raw")"#),
        "{asked:?}"
    );
    assert!(asked[0].contains("block_bytes: 512, read_only: true"), "{asked:?}");
    assert_eq!(asked[1..], ["remove c 7", "remove c 9", "resize c 7 Some(8192)", "resize c 7 None"]);
    for (command, arguments, description) in [
        ("add", json!({ "nsid": 7 }), "Parameter 'controller' is missing"),
        ("add", json!({ "controller": "c", "nsid": 0 }), "Parameter 'nsid' expects 1 to 1024"),
        ("add", json!({ "controller": "c", "nsid": 1u64 << 40 }), "Parameter 'nsid' expects 1 to 1024"),
        (
            "add",
            json!({ "controller": "c", "nsid": 7, "backend": "memory" }),
            "Parameter 'backend' does not accept value 'memory'",
        ),
        ("add", json!({ "controller": "c", "nsid": 7, "backend": "null" }), "Parameter 'size' is missing"),
        (
            "add",
            json!({ "controller": "c", "nsid": 7, "backend": "file", "path": "p", "lba": 520 }),
            "Parameter 'lba' expects 512 or 4096",
        ),
        (
            "add",
            json!({ "controller": "c", "nsid": 7, "backend": "null", "size": 4096, "metadata": 16 }),
            "metadata=16 is neither 8 nor, with lba=4096, 64",
        ),
        ("remove", json!({ "controller": "c" }), "Parameter 'nsid' is missing"),
        ("resize", json!({ "controller": "c", "nsid": 7, "to": 1 }), "Parameter 'to' is unexpected"),
    ] {
        assert_eq!(ask(command, &arguments), error("GenericError", description));
    }
    assert_eq!(setup.machine.asked().len(), 5, "nothing of that was done");
    let change = NamespaceChange::Resized { capacity_bytes: 8192 };
    setup.events.emit(Event::Namespace { controller: "c".to_owned(), nsid: 7, change });
    let event = raw.read();
    assert_eq!(event["event"], "X_FERRY_NAMESPACE");
    assert_eq!(
        event["data"],
        json!({ "controller": "c", "nsid": 7, "change": "resized", "capacity-bytes": 8192 })
    );
}

#[test]
fn access_to_namespaces_is_set_by_group_or_by_namespace() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    let mut ask = |arguments: &Value| {
        raw.ask(&json!({ "execute": "x-ferry-ana-set", "arguments": arguments }).to_string())
    };
    let states = ["optimized", "non-optimized", "inaccessible", "persistent-loss", "change"];
    for state in states {
        let answer = ask(&json!({ "controller": "c", "group": 16, "state": state }));
        assert_eq!(answer, json!({ "return": { "group": 16 } }), "{state}");
    }
    let answer = ask(&json!({ "controller": "c", "nsid": 17, "state": "change" }));
    assert_eq!(answer, error("GenericError", "nothing is shared"));
    let asked = setup.machine.asked();
    assert_eq!(asked[1], "access c Group(16) NonOptimized");
    assert_eq!(asked[5], "access c Namespace(17) Change");
    let one = "Parameters 'group' and 'nsid': one of them is expected";
    for (arguments, description) in [
        (json!({ "group": 1, "state": "change" }), "Parameter 'controller' is missing"),
        (json!({ "controller": "c", "state": "change" }), one),
        (json!({ "controller": "c", "group": 1, "nsid": 1, "state": "change" }), one),
        (json!({ "controller": "c", "group": 17, "state": "change" }), "Parameter 'group' expects 1 to 16"),
        (json!({ "controller": "c", "nsid": 0, "state": "change" }), "Parameter 'nsid' expects 1 to 1024"),
        (json!({ "controller": "c", "group": 1 }), "Parameter 'state' is missing"),
        (
            json!({ "controller": "c", "group": 1, "state": "lost" }),
            "Parameter 'state' does not accept value 'lost'",
        ),
    ] {
        assert_eq!(ask(&arguments), error("GenericError", description));
    }
    assert_eq!(setup.machine.asked().len(), 6, "nothing of that was done");
    let state = AccessState::PersistentLoss;
    setup.events.emit(Event::Access { controller: "c".to_owned(), group: 2, state });
    let event = raw.read();
    assert_eq!(event["event"], "X_FERRY_ANA");
    assert_eq!(event["data"], json!({ "controller": "c", "group": 2, "state": "persistent-loss" }));
}

#[test]
fn memory_that_follows_is_allowed_begun_and_recovered() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    let done = json!({ "return": {} });
    for request in [
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"postcopy-ram","state":true}]}}"#,
        r#"{"execute":"migrate-start-postcopy"}"#,
        r#"{"execute":"migrate-recover","arguments":{"uri":"unix:b"}}"#,
        r#"{"execute":"migrate-recover"}"#,
        r#"{"execute":"migrate","arguments":{"uri":"unix:c","resume":true}}"#,
    ] {
        assert_eq!(raw.ask(request), done, "{request}");
    }
    assert!(setup.machine.postcopy_ram());
    let asked = setup.machine.state.lock().unwrap().asked.clone();
    let recovered = ["Some(\"unix:b\")", "None", "Some(\"unix:c\")"].map(|uri| format!("recover {uri}"));
    assert_eq!(asked, [&["start postcopy".to_owned()][..], &recovered].concat());
}
