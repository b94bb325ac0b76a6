//! What the workers of every world have: one small table, surveyed once.
//!
//! Nobody trains in a simulation. An update is a one-hot vector, at a place that its worker and its round decide, so that
//! the difference between two models says which updates the later one holds, and how often.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::sync::LazyLock;

use learning::{Dataset, MIN_COUNT, Schema, Table};
use protocol::plan::DataSpec;

/// A table, and what its owner says of it.
#[derive(Debug)]
pub struct Material {
    dataset: Dataset,
    /// The survey, as it travels.
    pub survey: Vec<u8>,
    /// Rows behind it.
    pub rows: u64,
}

const ROWS: u64 = 12;

static NARROW: LazyLock<Material> = LazyLock::new(|| Material::new(24));
static WIDE: LazyLock<Material> = LazyLock::new(|| Material::new(96));

/// The material of a fleet of so many: its models have more than twice as many parameters.
#[must_use]
pub fn material(workers: usize) -> &'static Material {
    if workers <= 8 { &NARROW } else { &WIDE }
}

impl Material {
    fn new(columns: usize) -> Self {
        let names = (0..columns).map(|column| format!("x{column}")).collect::<Vec<_>>().join(",");
        let mut text = format!("{names},label\n");
        for row in 0..ROWS {
            for column in 0..columns as u64 {
                let _ = write!(text, "{},", (row * 7 + column * 3) % 11);
            }
            let _ = writeln!(text, "{}", row % 2);
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        let table = Table::read(file.path()).unwrap();
        let spec = DataSpec { validation_fraction: 0.0, ..DataSpec::default() };
        let mut dataset = Dataset::new(table, &spec, None, 7, "worker").unwrap();
        let survey = dataset.survey(MIN_COUNT).unwrap();
        Self { survey: survey.to_bytes(), rows: survey.training_rows(), dataset }
    }

    /// The rows as `schema` has them.
    #[must_use]
    pub fn encoded(&self, schema: &[u8]) -> Vec<u8> {
        let schema = Schema::from_bytes(schema).unwrap();
        let shard = self.dataset.encode(&schema).unwrap();
        shard.training.to_bytes(0, shard.training.len())
    }
}
