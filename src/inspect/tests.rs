//! Streams of ours and QEMU's through every way of looking at them; and what is none.

mod files;
mod hostile;
mod schemas;
