//! The heart of Tributary, without a single read of the world: messages, limits, the plan, the two machines, the
//! secure session, the sum.
//!
//! A training run is a value (`Federation`), and a worker's life is a value (`Member`). Both eat inputs and are
//! drained of outputs; whoever calls them owns the sockets, the disk and the clock. Nothing here knows tokio, quinn
//! or candle, draws entropy, or reads a file.
//!
//! Read in this order: [`messages`], `federation`, `member`, [`sum`], `session`.

pub mod draw;
pub mod evaluation;
pub mod federation;
pub mod ids;
pub mod invitation;
pub mod layout;
pub mod limits;
pub mod member;
pub mod messages;
pub mod pages;
pub mod plan;
pub mod session;
pub mod strategy;
pub mod sum;
