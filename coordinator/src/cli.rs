//! The command line. The help text is the doc comments; the exit status is 0 done, 1 failed, 2 misused.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand};
use protocol::ids::RunId;

use crate::config::{Config, ConfigError, Overrides};

/// Trains one model with a fleet of workers that keep their data
///
/// Without a command it runs: it listens for workers, trains the model that the config describes, writes it to
/// DIR/model and keeps serving /metrics until Ctrl-C. Workers on this machine find it by themselves; for others,
/// `coordinator invite` prints an invitation.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, args_conflicts_with_subcommands = false, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    run: RunArgs,

    #[command(flatten)]
    state: StateArgs,

    /// What to do instead of running
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The state directory, which every command needs.
#[derive(Debug, Args)]
struct StateArgs {
    /// Where keys, workers, runs and the model are kept
    ///
    /// Default: $XDG_STATE_HOME/tributary/coordinator, else ~/.local/state/tributary/coordinator.
    #[arg(long, value_name = "DIR", env = "TRIBUTARY_STATE", global = true)]
    state: Option<PathBuf>,
}

/// What running takes.
#[derive(Debug, Args)]
struct RunArgs {
    /// The TOML file with the data, the model, the training and the rounds
    #[arg(long, value_name = "FILE", env = "TRIBUTARY_CONFIG")]
    config: Option<PathBuf>,

    /// Where workers come in (UDP)
    #[arg(long, value_name = "ADDRESS", env = "TRIBUTARY_LISTEN", default_value = "0.0.0.0:4433", value_parser = parse_address)]
    listen: SocketAddr,

    /// Where /metrics, /healthz, /readyz and /status are served (TCP)
    #[arg(long, value_name = "ADDRESS", env = "TRIBUTARY_HTTP", default_value = "127.0.0.1:9464", value_parser = parse_address)]
    http: SocketAddr,

    /// How many rounds to train
    #[arg(long, value_name = "N", env = "TRIBUTARY_ROUNDS")]
    rounds: Option<u32>,

    /// Start the moment so many workers are in
    ///
    /// Without it: when two are in and no third came for 10 seconds.
    #[arg(long, value_name = "N", env = "TRIBUTARY_MIN_WORKERS")]
    min_workers: Option<u32>,

    /// End when the run is done
    ///
    /// Started again with the same plan, it prints the result again and exits 0.
    #[arg(long, env = "TRIBUTARY_EXIT_WHEN_DONE", value_parser = BoolishValueParser::new())]
    exit_when_done: bool,

    /// Begin a new run, even if another is unfinished
    #[arg(long)]
    new_run: bool,

    /// Print one JSON object a line on stdout
    #[arg(long, env = "TRIBUTARY_JSON", value_parser = BoolishValueParser::new())]
    json: bool,
}

/// What can be done instead of running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print an invitation for a worker on another machine
    Invite(InviteArgs),
    /// List the workers that are enrolled
    Workers,
    /// Shut a worker out, and close its connections
    Revoke {
        /// The worker's name, as `coordinator workers` lists it
        worker: String,
    },
    /// Print what the running coordinator is doing, as JSON
    Status,
    /// End the run; held updates are void, and their holders are told
    Abort,
    /// Tell who came in and what became of every task, and whether the record of it is whole
    ///
    /// Reads the state directory, or a copy of it, and changes nothing: a live coordinator does not mind. What a crash
    /// tore off the end is told; if anything is damaged, the exit status is 1 and the last line names file and offset.
    Audit(AuditArgs),
}

/// What is audited.
#[derive(Clone, Debug, Args)]
pub struct AuditArgs {
    /// Check every model, payload and attachment by its hash too
    #[arg(long)]
    pub verify: bool,

    /// The run to tell of, as the name of its directory in DIR/runs
    ///
    /// Default: the run that the coordinator is at.
    #[arg(long, value_name = "ID")]
    pub run: Option<RunId>,

    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// What an invitation says.
#[derive(Clone, Debug, Args)]
pub struct InviteArgs {
    /// Where workers reach this coordinator: HOST:PORT or HOST; up to four times
    #[arg(long = "address", value_name = "ADDRESS")]
    pub addresses: Vec<String>,

    /// How many workers may be enrolled with it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub uses: u32,

    /// For how long: a number and s, m, h or d
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = parse_duration)]
    pub expires: Duration,

    /// Write it to a file (mode 0600) instead of printing it
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// What a run needs to know, checked.
#[derive(Clone, Debug)]
pub struct RunSettings {
    /// The plan.
    pub config: Config,
    /// Where workers come in.
    pub listen: SocketAddr,
    /// Where is served what people read.
    pub http: SocketAddr,
    /// The state directory.
    pub state: PathBuf,
    /// Whether it ends when the run is done.
    pub exit_when_done: bool,
    /// Whether a new run begins whatever was.
    pub new_run: bool,
    /// Whether a program reads stdout.
    pub json: bool,
}

/// There is no home to keep a state in.
#[derive(Debug, thiserror::Error)]
#[error("neither XDG_STATE_HOME nor HOME is set, so there is no default state directory: give --state DIR")]
pub struct NoHome;

impl Cli {
    /// The state directory: as given, else the user's.
    ///
    /// # Errors
    /// If none was given and the user has no home.
    pub fn state(&self) -> Result<PathBuf, NoHome> {
        match &self.state.state {
            Some(path) => Ok(path.clone()),
            None => Ok(state_home()?.join("coordinator")),
        }
    }

    /// What a run needs to know.
    ///
    /// # Errors
    /// What is wrong with the config or the flags.
    pub fn run_settings(&self, state: PathBuf) -> Result<RunSettings, ConfigError> {
        let run = &self.run;
        let environment = |name: &str| std::env::var(name).ok();
        let flags = Overrides { rounds: run.rounds, min_workers: run.min_workers };
        Ok(RunSettings {
            config: Config::load(run.config.as_deref(), environment, flags)?,
            listen: run.listen,
            http: run.http,
            state,
            exit_when_done: run.exit_when_done,
            new_run: run.new_run,
            json: run.json,
        })
    }
}

/// Where this user's Tributary keeps its state: `$XDG_STATE_HOME/tributary`, else `~/.local/state/tributary`.
///
/// # Errors
/// If the user has no home.
pub fn state_home() -> Result<PathBuf, NoHome> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification: a relative path is to be ignored.
    let home = set("XDG_STATE_HOME").filter(|path| path.is_absolute());
    let home = home.or_else(|| set("HOME").map(|home| home.join(".local/state"))).ok_or(NoHome)?;
    Ok(home.join("tributary"))
}

/// An address of this machine, which needs no name.
fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected IP:PORT, such as 0.0.0.0:4433, 127.0.0.1:9464 or [::]:4433".to_owned())
}

/// `90`, `90s`, `15m`, `12h` or `7d`; at least a second, at most ten years.
fn parse_duration(text: &str) -> Result<Duration, String> {
    const YEARS_10_S: u64 = 3650 * 86_400;
    let expected = || format!("{text:?} is not a time such as 90s, 15m, 12h or 7d, up to 3650d");
    let (digits, unit) = match text.strip_suffix(|c: char| c.is_ascii_alphabetic()) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text, "s"),
    };
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(expected()),
    };
    let total = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(seconds)).ok_or_else(expected)?;
    if (1..=YEARS_10_S).contains(&total) { Ok(Duration::from_secs(total)) } else { Err(expected()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_two_lines_of_the_first_page_are_understood() {
        let cli = Cli::try_parse_from(["coordinator", "--listen", "0.0.0.0:4433"]).unwrap();
        assert!(cli.command.is_none());
        let cli = Cli::try_parse_from(["coordinator", "invite", "--address", "fleet.example.org", "--state", "x"]);
        let cli = cli.unwrap();
        assert_eq!(cli.state().unwrap(), PathBuf::from("x"));
        let Some(Command::Invite(invite)) = cli.command else { panic!("not an invitation") };
        assert_eq!((invite.uses, invite.expires), (1, Duration::from_secs(900)));
    }

    #[test]
    fn an_audit_says_what_it_reads() {
        let run = "07".repeat(16);
        let cli = Cli::try_parse_from(["coordinator", "audit", "--state", "x", "--verify", "--run", &run]).unwrap();
        let Some(Command::Audit(audit)) = cli.command else { panic!("not an audit") };
        assert_eq!((audit.verify, audit.json, audit.run), (true, false, Some(RunId([7; 16]))));
        assert!(Cli::try_parse_from(["coordinator", "audit", "--run", "../.."]).is_err());
        let help = Cli::command().find_subcommand_mut("audit").unwrap().render_long_help().to_string();
        for said in ["--verify", "--run <ID>", "--json", "changes nothing", "the exit status is 1"] {
            assert!(help.contains(said), "{said:?} is not in {help}");
        }
    }

    #[test]
    fn times_have_a_unit() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["", "m", "-1s", "0s", "5y", "1.5h", "99999999999999999999s", "4000d"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }
}
