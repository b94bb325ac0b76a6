//! The benchmarks: Tributary's figures, each beside a rival's or a limit's, both taken in turn, in one run on one machine.
//!
//! `suite` is `make bench`: the lines of one table. `durability` is `make bench-durability`. What both stand on is here
//! beside them: coordinators to measure (`home`), peers that do not train (`peer`, `fleet`), samples (`figures`).

mod bare;
pub mod durability;
mod figures;
mod fleet;
mod herd;
mod home;
mod lines;
mod machine;
mod peer;
mod process;
mod report;
mod rivals;
mod sides;
pub mod suite;
mod wire;
