//! Huge pages, which `tests/run` lends.

/// Where the kernel tells of its huge pages.
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
/// Set to [`LENT`] by who has lent pages for the tests.
const VARIABLE: &str = "FERRY_HUGE_PAGES";
const LENT: &str = "lent";

/// Whether so many pages of 2 MiB are free; says so if not.
///
/// # Panics
/// They are not, and somebody has lent them: a test would pass without testing anything.
#[must_use]
pub fn has_huge_pages(needed: u64) -> bool {
    let free = std::fs::read_to_string(FREE).ok().and_then(|free| free.trim().parse().ok());
    let is_lent = std::env::var(VARIABLE).is_ok_and(|value| value == LENT);
    is_enough(free.unwrap_or(0), needed, is_lent)
}

fn is_enough(free: u64, needed: u64, is_lent: bool) -> bool {
    assert!(free >= needed || !is_lent, "{VARIABLE}={LENT}, and {free} huge pages are free of {needed}");
    if free < needed {
        println!("this host has {free} huge pages free, less than {needed}");
    }
    free >= needed
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
    }
}
