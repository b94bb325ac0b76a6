//! The lines of the table, each in a module of its own.

mod bulk;
mod csv;
mod echo;
mod fold;
pub(crate) mod growth;
mod idle;
pub(crate) mod mnist;
mod model;
mod rounds;
mod session;
mod start;
mod step;

use anyhow::Result;
use clap::ValueEnum;

use crate::report::Report;
use crate::suite::Bench;

/// A line, by the name that `make bench LINE=…` knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Line {
    /// A round of a small model.
    Round,
    /// A round of a model of 40 MB.
    Model,
    /// Bulk goodput without the session.
    Bulk,
    /// Goodput with the session.
    Session,
    /// Verifying updates and folding them into the ring.
    Fold,
    /// A training step.
    Step,
    /// MNIST to 97 %.
    Mnist,
    /// A fleet of idle workers.
    Idle,
    /// CSV to encoded batches.
    Csv,
    /// Growth with workers, parameters and rows.
    Growth,
    /// Cold start, sizes, memory.
    Start,
}

impl Line {
    /// Its place in the table.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Round => 1,
            Self::Model => 2,
            Self::Bulk => 3,
            Self::Session => 4,
            Self::Fold => 5,
            Self::Step => 6,
            Self::Mnist => 7,
            Self::Idle => 8,
            Self::Csv => 9,
            Self::Growth => 10,
            Self::Start => 11,
        }
    }

    /// Measures it. An error is of the line alone: the others are measured all the same.
    pub(crate) fn measure(self, bench: &Bench, report: &mut Report) -> Result<()> {
        match self {
            Self::Round => rounds::measure(bench, report),
            Self::Model => model::measure(bench, report),
            Self::Bulk => bulk::measure(bench, report),
            Self::Session => session::measure(bench, report),
            Self::Fold => fold::measure(bench, report),
            Self::Step => step::measure(bench, report),
            Self::Mnist => mnist::measure(bench, report),
            Self::Idle => idle::measure(bench, report),
            Self::Csv => csv::measure(bench, report),
            Self::Growth => growth::measure(bench, report),
            Self::Start => start::measure(bench, report),
        }
    }
}
