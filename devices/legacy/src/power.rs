//! What ends the machine.

/// The guest asks for its end. Called on the vCPU thread that asked, possibly more than once and on several threads: an
/// implementation notes it and returns.
pub trait PowerEvents: Send + Sync {
    /// The guest asks to be reset.
    fn reset(&self);
    /// The guest asks to be switched off.
    fn power_off(&self);
}
