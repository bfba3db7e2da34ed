//! Writes the seeds of every target into the corpus: `cargo run -p fuzz --example seeds`. What is there stays.

use std::path::Path;
use std::{fs, io};

fn main() -> io::Result<()> {
    for target in fuzz::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
        fs::create_dir_all(&folder)?;
        for (index, seed) in (target.seeds)().iter().enumerate() {
            fs::write(folder.join(format!("seed-{index:02}")), seed)?;
        }
    }
    Ok(())
}
