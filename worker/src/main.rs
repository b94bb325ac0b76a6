//! Entry point: parse, run, exit status.

use std::process::ExitCode;

use clap::Parser as _;
use tributary_worker::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    fix_training_threads(cli.threads());
    wait_for_a_turn();
    cli::start_log();
    match cli.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::complain(&error),
    }
}

/// A worker computes: that something came for it is no reason to interrupt another one on the same core, who answers the
/// sooner for it. With as many workers as cores and more, rounds of a small model take a twentieth less time.
#[allow(unsafe_code)]
fn wait_for_a_turn() {
    #[cfg(target_os = "linux")]
    // SAFETY: both calls are about this process alone, no other thread exists yet, and the parameter is read only while the
    // second lasts. Who started the process may have chosen something else than the default, which stays.
    unsafe {
        if libc::sched_getscheduler(0) == libc::SCHED_OTHER {
            libc::sched_setscheduler(0, libc::SCHED_BATCH, &libc::sched_param { sched_priority: 0 });
        }
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
