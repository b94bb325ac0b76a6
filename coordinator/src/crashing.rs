//! `coordinator-crashing`: the coordinator, built so that it can end at one of
//! [`tributary_coordinator::crash::POINTS`].

#[path = "main.rs"]
mod coordinator;

fn main() -> std::process::ExitCode {
    coordinator::main()
}
