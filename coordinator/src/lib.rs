//! The coordinator: the shell around the `Federation` machine.

pub mod config;
