//! Entry point: parse, run, exit status.

use std::process::ExitCode;

use clap::Parser as _;
use tributary_worker::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    fix_training_threads(cli.threads());
    cli::start_log();
    match cli.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::complain(&error),
    }
}

/// candle and gemm read these when first used. On two threads the small steps of our models are two to seven times
/// slower than on one, and results must not differ with the number of cores.
#[allow(unsafe_code)]
fn fix_training_threads(threads: u16) {
    for key in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        // SAFETY: no other thread exists yet that could read the environment meanwhile: this is called from `main`
        // before the runtime is built, and parsing the command line starts none.
        unsafe { std::env::set_var(key, threads.to_string()) };
    }
}
