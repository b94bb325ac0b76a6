//! The coordinator: the shell around the `Federation` machine.

pub mod cli;
pub mod config;
pub mod registry;
pub mod state;
pub mod store;
