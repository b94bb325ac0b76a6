//! The command line: what may be said, what it becomes, and what is printed.
//!
//! Flags win over the environment. JSON lines go to stdout, all else to stderr.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand};
use protocol::ids::{Hash, WorkerName};
use protocol::invitation::{INVITATION_LEN_MAX, Invitation};

use crate::options::Options;
use crate::receipts::verify_log;
use crate::report::{Line, Report};
use crate::state::StatePlace;
use crate::{Outcome, WorkerError, predict, run};

/// Where an invitation is looked for that `--join` does not give.
const JOIN_VARIABLE: &str = "TRIBUTARY_JOIN";

/// Train on your own data file with a fleet of others; the rows stay here.
#[derive(Debug, Parser)]
#[command(name = "worker", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The data: a CSV file with a header line, or images in idx format with their labels beside them
    #[arg(long, value_name = "FILE", required = true, env = "TRIBUTARY_DATA")]
    data: Option<PathBuf>,
    /// The invitation, needed once: its text, @FILE, or - for standard input
    ///
    /// Without it, a worker that is enrolled already goes on; another one looks for the invitation that a coordinator
    /// on this machine leaves for its own user.
    #[arg(long, value_name = "STRING|@FILE|-", env = JOIN_VARIABLE, hide_env_values = true)]
    join: Option<String>,
    /// Where keys and receipts are kept [default: $XDG_STATE_HOME/tributary/worker/NAME]
    #[arg(long, value_name = "DIR", env = "TRIBUTARY_STATE")]
    state: Option<PathBuf>,
    /// The name to ask for in the fleet [default: the data file's, without its ending]
    #[arg(long, env = "TRIBUTARY_NAME")]
    name: Option<WorkerName>,
    /// What this file calls the label column, if the fleet calls it something else
    #[arg(long, value_name = "COLUMN", env = "TRIBUTARY_LABEL")]
    label: Option<String>,
    /// Threads that share a training step, where it has work for more than one
    #[arg(long, value_name = "N", default_value_t = 1, env = "TRIBUTARY_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Let encoded training rows leave this machine, for a run of mode "central"
    #[arg(long, env = "TRIBUTARY_SHARE_ROWS", value_parser = BoolishValueParser::new())]
    share_rows: bool,
    /// Name no category to the coordinator that fewer rows have
    #[arg(long, value_name = "N", default_value_t = learning::MIN_COUNT, env = "TRIBUTARY_MIN_COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    min_count: u64,
    /// Print one JSON object a line on stdout
    #[arg(long, env = "TRIBUTARY_JSON", value_parser = BoolishValueParser::new())]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Predict with a finished model; needs nothing but the model's directory
    Predict(PredictArgs),
    /// Verify kept receipts, offline: each says that an update is in the model
    VerifyReceipts(VerifyArgs),
}

#[derive(Debug, Args)]
struct VerifyArgs {
    /// The log of a run: receipts/RUN.log in the worker's state directory
    #[arg(value_name = "FILE")]
    log: PathBuf,
    /// The coordinator's Ed25519 key in hex, if it is known from elsewhere [default: the one that the log names]
    #[arg(long, value_name = "HEX")]
    coordinator: Option<Hash>,
}

#[derive(Debug, Args)]
struct PredictArgs {
    /// The model: a directory with model.safetensors and model.json
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The rows: a CSV file with a header line; the label column may be absent
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where the rows go, each with its prediction
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Cli {
    /// How many threads may train.
    #[must_use]
    pub fn threads(&self) -> u16 {
        self.run.threads
    }

    /// Does what was asked.
    ///
    /// # Errors
    /// Whatever stopped it.
    pub fn execute(self) -> Result<(), WorkerError> {
        match self.command {
            Some(Command::Predict(args)) => {
                let rows = predict(&args.model, &args.data, &args.out)?;
                say(&format!("{}: {rows} rows", args.out.display()));
                Ok(())
            }
            Some(Command::VerifyReceipts(args)) => verify(&args),
            None => work(self.run),
        }
    }
}

fn verify(args: &VerifyArgs) -> Result<(), WorkerError> {
    let mut count = 0u64;
    let key = verify_log(&args.log, args.coordinator.map(|key| key.0), |receipt| {
        count += 1;
        // A reader that has seen enough, such as `head`, is no reason to stop verifying.
        let _ = writeln!(
            io::stdout().lock(),
            "round {}: task {}, update {}, model {}",
            receipt.round,
            receipt.task,
            receipt.hash,
            receipt.model_hash
        );
    })?;
    let signer = key.map(|key| format!(", all signed by {}", Hash(key))).unwrap_or_default();
    say(&format!("{}: {count} receipts{signer}", args.log.display()));
    Ok(())
}

fn work(args: RunArgs) -> Result<(), WorkerError> {
    let report = printer(args.json);
    let options = options(args, report)?;
    // One thread: what passes between the connection and the loop wakes nobody.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(WorkerError::Runtime)?;
    let outcome = runtime.block_on(async {
        let shutdown = Shutdown::listen().map_err(WorkerError::Runtime)?;
        // A task among the others: who waits in `block_on` is woken by a system call each time.
        let run = tokio::spawn(run(options, shutdown.first())).await;
        run.map_err(|error| WorkerError::Runtime(error.into()))?
    });
    // A training step that does not look at its cancel flag must not hold the process up.
    runtime.shutdown_background();
    outcome.map(|outcome| match outcome {
        Outcome::Finished { .. } | Outcome::Stopped => (),
    })
}

fn options(args: RunArgs, report: Report) -> Result<Options, WorkerError> {
    let home = match (&args.state, &args.join) {
        // Then nothing is looked for there.
        (Some(_), Some(_)) => state_home().unwrap_or_default(),
        _ => state_home()?,
    };
    let home = home.join("tributary");
    let state = args.state.map_or_else(|| StatePlace::Under(home.join("worker")), StatePlace::Here);
    let variable = std::env::var(JOIN_VARIABLE).ok();
    let said = if args.join.is_some() && args.join == variable { JOIN_VARIABLE } else { "--join" };
    let join = args.join.as_deref().map(|text| invitation(text, said, io::stdin().lock())).transpose()?;
    let data = args.data.expect("clap requires --data where no subcommand is given");
    Ok(Options {
        join,
        name: args.name,
        label: args.label,
        share_rows: args.share_rows,
        min_count: args.min_count,
        threads: usize::from(args.threads),
        report,
        ..Options::new(data, state, home.join("join"))
    })
}

/// `$XDG_STATE_HOME`, or `~/.local/state` where it is not set to an absolute path.
fn state_home() -> Result<PathBuf, WorkerError> {
    let absolute = |key| std::env::var_os(key).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .ok_or(WorkerError::NoHome)
}

/// Reads what `--join` or its variable, whichever was `said`, names.
fn invitation(text: &str, said: &str, stdin: impl io::Read) -> Result<Invitation, WorkerError> {
    let (text, place) = match text.strip_prefix('@') {
        Some(path) => (read_invitation(File::open(path), path)?, path.to_owned()),
        None if text == "-" => (read_invitation(Ok(stdin), "standard input")?, "standard input".to_owned()),
        None => (text.to_owned(), said.to_owned()),
    };
    text.parse().map_err(|source| WorkerError::Invitation { place, source })
}

fn read_invitation(file: io::Result<impl io::Read>, place: &str) -> Result<String, WorkerError> {
    let failed = |source| WorkerError::InvitationFile { place: place.to_owned(), source };
    let mut text = String::new();
    // One more than fits, so that a longer one is refused as too long and not as cut short.
    file.and_then(|file| file.take(2 * INVITATION_LEN_MAX as u64).read_to_string(&mut text)).map_err(failed)?;
    Ok(text)
}

/// Ctrl-C and SIGTERM. The first asks the worker to say goodbye, the second ends the process at once.
struct Shutdown {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Shutdown {
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn first(mut self) {
        self.next().await;
        tokio::spawn(async move {
            self.next().await;
            std::process::exit(1);
        });
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => (),
            _ = self.terminate.recv() => (),
        }
    }
}

/// Prints each line: JSON on stdout for a program, else a sentence on stderr for a person.
fn printer(json: bool) -> Report {
    Report::new(Arc::new(move |line: &Line| {
        // Whoever read us may have gone; training goes on.
        let _ = if json { print_json(line) } else { print_plain(line) };
    }))
}

/// In one piece: stderr has no buffer, and a line written by parts is as many system calls.
fn print_plain(line: &Line) -> io::Result<()> {
    io::stderr().write_all(format!("{line}\n").as_bytes())
}

fn print_json(line: &Line) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    writeln!(out)?;
    out.flush()
}

/// Prints an error with all that it rests on: `error: a: b: c`.
pub fn complain(error: &dyn std::error::Error) -> ExitCode {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let said = source.to_string();
        // A transparent error repeats its source's words.
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        next = source.source();
    }
    say(&format!("error: {text}"));
    ExitCode::FAILURE
}

/// A line on stderr. A terminal that has gone away is no reason to fail.
fn say(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Logs go to stderr: warnings for a person at a terminal, what `TRIBUTARY_LOG` asks for otherwise.
pub fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TRIBUTARY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,quinn=error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn one_file_is_all_that_a_worker_needs() {
        let cli = parse("worker --data shard.csv").unwrap();
        assert_eq!(cli.run.data.unwrap(), Path::new("shard.csv"));
        assert_eq!((cli.run.threads, cli.run.min_count, cli.run.share_rows), (1, learning::MIN_COUNT, false));
    }

    #[test]
    fn misuse_is_status_2() {
        for line in ["worker", "worker --data a --threads 0", "worker --data a --name -x", "worker predict --model m"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn predict_needs_no_data_of_its_own() {
        let cli = parse("worker predict --model m --data d.csv --out o.csv").unwrap();
        assert!(matches!(cli.command, Some(Command::Predict(_))));
    }

    #[test]
    fn an_invitation_comes_from_text_file_or_standard_input() {
        let invitation_of = |text: &str, stdin: &[u8]| invitation(text, "--join", stdin).unwrap_err().to_string();
        assert!(invitation_of("hello", b"").starts_with("--join"), "{}", invitation_of("hello", b""));
        assert!(invitation("hello", JOIN_VARIABLE, io::empty()).unwrap_err().to_string().starts_with("TRIBUTARY_JOIN"));
        assert!(invitation_of("-", b"hello").starts_with("standard input"));
        assert!(invitation_of("@nowhere.txt", b"").starts_with("nowhere.txt"));
    }
}
