//! Machines that cannot be: one sentence that says why, a status that is not 0, and nothing left behind.

use support::{TestBed, WATCHDOG};

use crate::guest::{EXERCISER, bed, one_disk};

/// Runs `ferry run` with `flags`, which must fail; what it says.
fn mistake(bed: &TestBed, flags: &[String]) -> String {
    let api = bed.path("mistake.api").display().to_string();
    let arguments = [&["run".to_owned(), "--api".to_owned(), api], flags].concat();
    let mut process = bed.ferry("mistake", &arguments);
    let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
    // The reader of the log ends after the process.
    let last = process.log.wait_for(0, WATCHDOG, |line| line.starts_with("ferry: ").then(|| line.to_owned()));
    let (sentence, next) = last.unwrap_or_else(|| panic!("{}", process.describe("no sentence from")));
    assert_eq!(
        process.log.wait_for(next, WATCHDOG, |line| Some(line.to_owned())),
        None,
        "it is the last word"
    );
    assert_eq!(exit.code(), Some(1), "{sentence}");
    assert!(!bed.files().contains(&"mistake.api".to_owned()), "the control socket is gone");
    sentence
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn what_cannot_be_run_is_refused_in_one_sentence() {
    let bed = bed();
    let missing = bed.path("missing").display().to_string();
    let none = one_disk(&bed);
    let image = bed.path("a.img").display().to_string();
    let cases = [
        (words(&format!("--kernel {missing}")), missing.clone()),
        (words("--memory 64M"), "--kernel".to_owned()),
        (words(&format!("--kernel {EXERCISER} --memory 17M")), "--memory 17M".to_owned()),
        (words("--memory much --incoming unix:a"), "--memory \"much\"".to_owned()),
        // There is an image, but no guest has had it.
        (words(&format!("--incoming unix:a --nvme path={image},serial=s")), "--with-storage".to_owned()),
        (words(&format!("--kernel {EXERCISER} --nvme path={missing},serial=s")), missing.clone()),
        (words(&format!("--kernel {EXERCISER} --serial unix:{missing}/x")), missing.clone()),
        (words(&format!("--kernel {missing} --serial file:{}", bed.path("console").display())), missing),
        (
            words(&format!("--kernel {EXERCISER} --nvme path={image},serial=s --nvme path={image},serial=t")),
            "are one image".to_owned(),
        ),
    ];
    for (flags, expected) in cases {
        let sentence = mistake(&bed, &flags);
        assert!(sentence.contains(&expected), "{flags:?}: {sentence}");
        assert_eq!(bed.files(), ["a.img"], "{flags:?}");
    }
    drop(none);
}

#[test]
fn flags_that_mean_nothing_are_refused() {
    let bed = bed();
    for flags in ["--cpus many", "--nvme serial=", "--ns nsid=1", "--incoming nowhere:", "--nonsense"] {
        let arguments = [words("run"), words(flags)].concat();
        let mut process = bed.ferry("mistake", &arguments);
        let exit = process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(exit.code(), Some(2), "{flags}");
        let says = |line: &str| line.starts_with("error: ").then(|| line.to_owned());
        let (sentence, _) = process.log.wait_for(0, WATCHDOG, says).expect("a sentence");
        assert!(sentence.contains(flags.split(' ').next().unwrap_or(flags)), "{flags}: {sentence}");
    }
    assert!(bed.files().is_empty(), "{:?}", bed.files());
}

#[test]
fn a_guest_that_runs_keeps_others_from_its_image() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut vm = machine.boot(&bed, "first", EXERCISER, "queues=1");
    let before = vm.progress("the guest", |_| true);
    let sentence = mistake(&bed, &[machine.flags(), &words(&format!("--kernel {EXERCISER}"))].concat());
    assert!(sentence.contains("a.img"), "{sentence}");
    let holder = "VM \"first\" (host ";
    assert!(
        sentence.contains(holder) && sentence.contains(&format!("pid {}", vm.process.id())),
        "{sentence}"
    );
    vm.verifies(before.verified, 100);
    vm.finish();
    let mut again = machine.boot(&bed, "second", EXERCISER, "queues=1");
    again.verifies(0, 100);
    again.finish();
}
