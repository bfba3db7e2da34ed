//! What `ferry inspect` prints of a file, whatever is in it.

use std::io;

use ferry::inspect::{Input, Limited, Tree, write_json};

/// More than any file of the corpus needs, so that what is printed takes bounded time.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

/// Prints `data` for people and for programs.
pub fn inspect(data: &[u8]) {
    let Ok(input) = Input::new(data, None) else { return };
    let mut tree = Tree::new(Limited::new(io::sink(), OUTPUT_BYTES_MAX));
    // Both may refuse it, each with an error.
    let (_, _refused) = input.walk(&mut tree);
    let out = Limited::new(io::sink(), OUTPUT_BYTES_MAX);
    let _refused = write_json(&input, out, |_| true, false);
}
