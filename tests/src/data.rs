//! Data files for tests: small, made by keyed draws, with something to learn in them.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;

use protocol::draw::Draw;

/// A CSV of a two-class problem: numeric `x0`, `x1`, text `colour`, label `label` (0 or 1), which a linear model
/// learns to an AUC of about 0.9. `shard` changes the rows and nothing else.
#[must_use]
pub fn classes(shard: u64, rows: usize) -> String {
    let mut draw = Draw::new(shard, "test classes", 0, "");
    let mut text = "x0,x1,colour,label\n".to_owned();
    for _ in 0..rows {
        let (x0, x1) = (draw.uniform() * 4.0 - 2.0, draw.uniform() * 4.0 - 2.0);
        let colour = ["red", "green", "blue"][usize::try_from(draw.below(3)).unwrap()];
        let bias = if colour == "red" { 1.0 } else { 0.0 };
        let score = 2.0 * x0 - x1 + bias + (draw.uniform() - 0.5);
        let _ = writeln!(text, "{x0:.4},{x1:.4},{colour},{}", u8::from(score > 0.0));
    }
    text
}

/// A CSV of a regression problem: `x0`, `x1`, target `y` with some noise.
#[must_use]
pub fn numbers(shard: u64, rows: usize) -> String {
    let mut draw = Draw::new(shard, "test numbers", 0, "");
    let mut text = "x0,x1,y\n".to_owned();
    for _ in 0..rows {
        let (x0, x1) = (draw.uniform() * 4.0 - 2.0, draw.uniform() * 4.0 - 2.0);
        let _ = writeln!(text, "{x0:.4},{x1:.4},{:.4}", 3.5 * x0 - 1.25 * x1 + 10.5 + draw.uniform() * 0.1);
    }
    text
}

/// A CSV of a three-class problem: numeric `x0`, `x1`, label `size` (`small`, `medium`, `large`), which a model learns
/// to an accuracy of about 0.9. The label is not where a default would look for it.
#[must_use]
pub fn sizes(shard: u64, rows: usize) -> String {
    let mut draw = Draw::new(shard, "test sizes", 0, "");
    let mut text = "size,x0,x1\n".to_owned();
    for _ in 0..rows {
        let (x0, x1) = (draw.uniform() * 4.0 - 2.0, draw.uniform() * 4.0 - 2.0);
        let size = match x0 + x1 + (draw.uniform() - 0.5) * 0.2 {
            sum if sum < -1.0 => "small",
            sum if sum > 1.0 => "large",
            _ => "medium",
        };
        let _ = writeln!(text, "{size},{x0:.4},{x1:.4}");
    }
    text
}
