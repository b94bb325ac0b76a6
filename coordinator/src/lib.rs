//! The coordinator: the shell around the `Federation` machine.

pub mod cli;
pub mod config;
pub mod control;
pub mod enrol;
pub mod http;
pub mod registry;
pub mod show;
pub mod state;
pub mod store;
pub mod telemetry;
