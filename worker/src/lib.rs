//! The shell around the member machine: connection loop, training thread, command line.
//!
//! What a worker decides is [`protocol::member::Member`]'s; what it learns is `learning`'s. Here is what touches the
//! world, in the order in which it happens: [`cli`] says what to do, [`state`] whose keys these are, [`enrolments`] and
//! `enrol` who invited us, `link` how we are connected, [`run`] what goes on then, `trainer` the thread that computes,
//! `transfer` and `contents` what travels on streams of their own, `keeper` what survives this process, [`receipts`] the
//! proof that stays.

pub mod cli;
mod contents;
mod enrol;
pub mod enrolments;
mod error;
mod files;
mod keeper;
mod link;
mod options;
mod predict;
pub mod receipts;
pub mod report;
mod run;
pub mod state;
mod trainer;
mod transfer;

pub use enrol::EnrolError;
pub use error::WorkerError;
pub use files::FileError;
pub use link::LinkError;
pub use options::{Hooks, OnOffer, OnPlain, OnSignature, Options};
pub use predict::{PredictError, predict};
pub use run::{Outcome, run};
