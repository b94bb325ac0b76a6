//! Every test of whole programs and of files that are no code, in one binary.
#![allow(clippy::unwrap_used, missing_docs)]

mod canary;
mod commandline;
mod config;
mod crash;
mod csv;
mod deploy;
mod disks;
mod identity;
mod modes;
mod monitoring;
mod network;
mod restored;
mod runs;
mod soak;
mod state;
mod updates;
mod weather;
