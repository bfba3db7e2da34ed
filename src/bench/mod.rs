//! Measurements, repeated, with a reference from the same minutes and the host that they hold for.
//!
//! [`migrate`] moves busy guests again and again, those of a [`case`] each, [`table`] shows it, and [`difference`] what one thing costs;
//! [`copy`] is what the host's own sockets and memory give at best; [`restore`] takes guests out of files; [`nvme`] counts the commands
//! that a guest gets done, [`costs`] what they cost besides time; [`fio`] is what the host does with the same file itself; [`host`] says
//! which host it was; [`spread`] is how repeated figures are summed up. Figures never decide a test.

pub mod case;
pub mod copy;
pub mod costs;
pub mod difference;
pub mod fio;
pub mod host;
pub mod migrate;
pub mod nvme;
pub mod restore;
pub mod spread;
pub mod table;
