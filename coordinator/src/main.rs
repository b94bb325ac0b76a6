//! `coordinator`: parse, run, exit status.

use std::error::Error as StdError;
use std::io;
use std::process::ExitCode;

use clap::Parser as _;
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;
use tributary_coordinator::cli::{Cli, state_home};
use tributary_coordinator::show::{LogWriter, Look};
use tributary_coordinator::{Options, Outcome, orders, run};

/// Threads of the runtime at most: half of the cores, since the workshop and the compute pool have their own.
const RUNTIME_THREADS_MAX: usize = 4;

/// Parses what was typed, runs it, and says how it ended.
pub(crate) fn main() -> ExitCode {
    single_threaded_products();
    few_arenas();
    let cli = Cli::parse();
    let state = match cli.state() {
        Ok(state) => state,
        Err(error) => return failed(&error, 2),
    };
    if let Some(command) = &cli.command {
        return orders::execute(&state, command).map_or_else(|error| failed(&error, 1), |()| ExitCode::SUCCESS);
    }
    let settings = match cli.run_settings(state) {
        Ok(settings) => settings,
        Err(error) => return failed(&error, 2),
    };
    let look = Look::of_stderr(settings.json);
    log_to(look.clone());
    let json: Option<Box<dyn io::Write + Send>> = if settings.json { Some(Box::new(io::stdout())) } else { None };
    let default_join = state_home().ok().map(|home| home.join("join"));
    let options = Options { default_join, json, look, leisure: true, ..Options::quiet(settings) };
    let outcome = match runtime() {
        Ok(runtime) => {
            let outcome = runtime.block_on(async { run(options, orders::interrupted()?).await });
            // A disk that does not answer must not hold up the end.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(Outcome::Finished | Outcome::Stopped) => ExitCode::SUCCESS,
        Err(error) => failed(&error, error.exit_status()),
    }
}

/// On one thread, what passes between connections and the event loop wakes nobody, which is most of what a small round
/// takes; with more cores, connections that move much share some.
fn runtime() -> io::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut builder = match (cores / 2).min(RUNTIME_THREADS_MAX) {
        0 | 1 => Builder::new_current_thread(),
        threads => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    builder.enable_all().build()
}

/// Matrix products of our sizes are slower on two threads than on one, and the libraries read this when first used.
#[allow(unsafe_code)]
fn single_threaded_products() {
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        if std::env::var_os(name).is_none() {
            // SAFETY: this is the first thing that main does, so no other thread reads the environment.
            unsafe { std::env::set_var(name, "1") };
        }
    }
}

/// How many arenas glibc may have: one for the event loop and one for everybody else.
const ARENAS_MAX: i32 = 2;

/// glibc gives threads arenas of their own, each of which keeps what it once needed, so that memory grows with the threads that
/// ever checked a payload.
#[allow(unsafe_code)]
fn few_arenas() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no other thread exists yet, so nothing is allocated meanwhile; a value that is refused changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
    }
}

/// `error: a: b: c`.
fn failed(error: &dyn StdError, status: u8) -> ExitCode {
    let mut chain = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let told = cause.to_string();
        if !chain.ends_with(&told) {
            chain = format!("{chain}: {told}");
        }
        source = cause.source();
    }
    Look::Plain.say(&format!("error: {chain}"));
    ExitCode::from(status)
}

/// Log lines go where lines for a person go; `TRIBUTARY_LOG` says how many.
fn log_to(look: Look) {
    let filter =
        EnvFilter::try_from_env("TRIBUTARY_LOG").unwrap_or_else(|_| EnvFilter::new("tributary_coordinator=info,warn"));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).without_time();
    // Nobody else sets one in this process.
    let _ = subscriber.with_writer(move || LogWriter(look.clone())).try_init();
}
