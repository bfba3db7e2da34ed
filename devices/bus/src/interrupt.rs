//! Wired interrupts.

/// A wired interrupt line, for example an input of the I/O APIC. Implemented by the VMM, or by a recorder in tests.
pub trait InterruptLine: Send + Sync {
    /// Drives the line. Calling it again with the same level is harmless.
    fn set_level(&self, high: bool);

    /// Raises and lowers the line: one edge.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}
