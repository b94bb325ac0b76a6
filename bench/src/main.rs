//! Tributary measured beside every rival and every limit: see `bench/README.md`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tributary_bench::suite::main()
}
