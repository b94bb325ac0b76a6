//! `make soak`: kills the coordinator and the workers of a real fleet 200 times, and says what became of it.
#![allow(clippy::print_stdout, reason = "printing is what this program is for")]

use std::process::ExitCode;

const USAGE: &str = "usage: soak [KILLS [SEED]]
  KILLS  how many processes are killed, 200 if it is not said
  SEED   what the moments and the victims are drawn from, 1 if it is not said";

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).map(|word| word.parse::<u32>()).collect();
    let (kills, seed) = match words.as_slice() {
        [] => (200, 1),
        [Ok(kills)] => (*kills, 1),
        [Ok(kills), Ok(seed)] => (*kills, *seed),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    // It panics, with the story of the process that broke, if anything did.
    println!("{}", tributary_tests::soak::soak(kills, seed.into()));
    ExitCode::SUCCESS
}
