//! The shell around the federation machine: event loop, store, telemetry, HTTP, command line.
