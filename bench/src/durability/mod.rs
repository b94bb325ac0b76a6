//! `bench-durability`: what durability costs, each figure beside what it is compared with, in one run on one machine.
//!
//! A benchmark that cannot go on panics: there is nobody whom a typed error would help. `bench/README.md` has the
//! figures of one dated run.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

mod crowd;
mod journal;
mod recovery;
mod resume;
mod slow;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::figures::Table;

/// Measures what durability costs
///
/// Prints a table in Markdown. The coordinator and worker binaries must lie beside this one.
#[derive(Debug, Parser)]
struct Args {
    /// A directory on the disk that is measured
    #[arg(long, value_name = "DIR", default_value = ".")]
    disk: PathBuf,

    /// A directory in memory
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    tmpfs: PathBuf,

    /// Where the figures go as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// What is measured; all of it by default
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,

    /// How often each figure is taken
    #[arg(long, value_name = "N", default_value_t = 9)]
    repetitions: u32,

    /// How often the coordinator is killed
    #[arg(long, value_name = "N", default_value_t = 50)]
    kills: u32,

    /// How many workers offer 40 MB at once; the disk needs room for all of it
    #[arg(long, value_name = "N", default_value_t = 200)]
    crowd: usize,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    Round,
    Update,
    Crowd,
    Recovery,
    Slow,
    Resume,
}

/// What every section needs.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) runtime: Runtime,
    pub(crate) disk: PathBuf,
    pub(crate) tmpfs: PathBuf,
    pub(crate) repetitions: u32,
    pub(crate) kills: u32,
    pub(crate) crowd: usize,
    pub(crate) table: Table,
}

impl Bench {
    fn measure(&mut self, section: Section) {
        match section {
            Section::Round => journal::round(self),
            Section::Update => journal::update(self),
            Section::Crowd => crowd::crowd(self),
            Section::Recovery => recovery::recovery(self),
            Section::Slow => slow::slow_disk(self),
            Section::Resume => resume::resume(self),
        }
    }
}

/// What `bench-durability` does.
#[allow(clippy::print_stdout)] // the table is what this program is for
pub fn main() {
    let args = Args::parse();
    // Peers and workers; a coordinator has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let Args { disk, tmpfs, repetitions, kills, crowd, .. } = args;
    let disk = disk.canonicalize().unwrap();
    let mut bench = Bench { runtime, disk, tmpfs, repetitions, kills, crowd, table: Table::default() };
    for section in Section::value_variants() {
        if args.only.is_empty() || args.only.contains(section) {
            bench.measure(*section);
        }
    }
    println!("{}", bench.table.markdown());
    if let Some(out) = args.out {
        let all = json!({ "machine": crate::machine::describe(), "figures": bench.table.json() });
        std::fs::write(out, format!("{all:#}\n")).unwrap();
    }
}
