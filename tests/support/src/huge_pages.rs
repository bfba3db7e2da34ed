//! Huge pages, which `tests/run` lends: some that are set aside, and some that the host gives to who asks.

use std::fs;

/// Where the kernel tells of its huge pages.
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
/// Who gets some in shared memory: the word in brackets.
const GIVEN: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
/// Set to [`LENT`] by who has lent pages for the tests.
const VARIABLE: &str = "FERRY_HUGE_PAGES";
/// The same for those of [`GIVEN`].
const TRANSPARENT_VARIABLE: &str = "FERRY_TRANSPARENT_HUGE_PAGES";
const LENT: &str = "lent";

/// Whether so many pages of 2 MiB are free; says so if not.
///
/// # Panics
/// They are not, and somebody has lent them: a test would pass without testing anything.
#[must_use]
pub fn has_huge_pages(needed: u64) -> bool {
    let free = fs::read_to_string(FREE).ok().and_then(|free| free.trim().parse().ok());
    is_enough(free.unwrap_or(0), needed, is_lent(VARIABLE))
}

/// Whether the host gives huge pages to shared memory that asks for them; says so if not.
///
/// # Panics
/// It does not, and somebody has told it to.
#[must_use]
pub fn has_transparent_huge_pages() -> bool {
    gives(&fs::read_to_string(GIVEN).unwrap_or_default(), is_lent(TRANSPARENT_VARIABLE))
}

fn is_lent(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == LENT)
}

fn is_enough(free: u64, needed: u64, is_lent: bool) -> bool {
    assert!(free >= needed || !is_lent, "{VARIABLE}={LENT}, and {free} huge pages are free of {needed}");
    if free < needed {
        println!("this host has {free} huge pages free, less than {needed}");
    }
    free >= needed
}

fn gives(setting: &str, is_lent: bool) -> bool {
    let gives =
        ["[always]", "[within_size]", "[advise]", "[force]"].iter().any(|word| setting.contains(word));
    assert!(gives || !is_lent, "{TRANSPARENT_VARIABLE}={LENT}, and {GIVEN} says {setting:?}");
    if !gives {
        println!("this host gives no transparent huge pages to shared memory ({GIVEN})");
    }
    gives
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_may_be_missing_unless_they_were_lent() {
        let found =
            [(128, false), (127, false), (128, true)].map(|(free, is_lent)| is_enough(free, 128, is_lent));
        assert_eq!(found, [true, false, true]);
        let missing = std::panic::catch_unwind(|| is_enough(127, 128, true)).unwrap_err();
        let words = missing.downcast_ref::<String>().expect("a sentence");
        assert_eq!(words, "FERRY_HUGE_PAGES=lent, and 127 huge pages are free of 128");

        const NEVER: &str = "always within_size advise [never] deny force\n";
        let advise = NEVER.replace("advise [never]", "[advise] never");
        assert_eq!(
            [(NEVER, false), ("", false), (&advise, true)].map(|(text, is_lent)| gives(text, is_lent)),
            [false, false, true]
        );
        assert!(std::panic::catch_unwind(|| gives(NEVER, true)).is_err());
    }
}
