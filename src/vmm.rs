//! (skeleton)
pub fn run(_: &crate::cli::RunArguments) -> anyhow::Result<()> {
    Ok(())
}
