//! The shell around the member machine: connection loop, training thread, command line.
