//! Training, evaluation and saved models, on real rows: scikit-learn's breast cancer table in three shards.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_precision_loss)]

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use protocol::evaluation::{Evaluation, EvaluationSummary, summarise};
use protocol::pages::Numbers;
use protocol::plan::{BatchSize, DataSpec, ModelSpec, TrainSpec};
use tempfile::TempDir;
use tributary_learning::{
    Dataset, Network, Rows, SavedModel, Schema, Shard, Stopped, Table, TaskKey, auc, merge, norm,
};

const TABLE: &str = include_str!("../testdata/breast_cancer.csv");
const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three workers with a shard each, and what they share.
struct Fleet {
    dir: TempDir,
    schema: Schema,
    shards: Vec<Shard>,
}

impl Fleet {
    fn new(table: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let spec = DataSpec::default();
        let (header, rows) = table.split_once('\n').unwrap();
        let mut datasets = Vec::new();
        for (at, name) in NAMES.iter().enumerate() {
            // Shards of 1/7, 2/7 and 4/7.
            let own = rows.lines().enumerate().filter(|(row, _)| [1, 3, 7][at] > row % 7 && row % 7 >= [0, 1, 3][at]);
            let path = dir.path().join(format!("{name}.csv"));
            fs::write(&path, [header].into_iter().chain(own.map(|(_, row)| row)).collect::<Vec<_>>().join("\n"))
                .unwrap();
            datasets.push(Dataset::new(Table::read(&path).unwrap(), &spec, None, 7, name).unwrap());
        }
        let surveys = NAMES.iter().zip(&mut datasets).map(|(name, data)| ((*name).to_owned(), data.survey(5).unwrap()));
        let schema = merge(&surveys.collect::<BTreeMap<_, _>>(), &spec).unwrap().schema;
        let shards = datasets.iter().map(|data| data.encode(&schema).unwrap()).collect();
        Self { dir, schema, shards }
    }

    fn union(&self) -> Rows {
        let mut union = Rows::new(&self.schema);
        for Shard { training, .. } in &self.shards {
            union.append(&training.to_bytes(0, training.len()), &self.schema).unwrap();
        }
        union
    }

    fn network(&self, spec: &ModelSpec) -> Network {
        Network::new(spec, &self.schema).unwrap()
    }

    fn evaluations(&self, network: &Network, weights: &[f32]) -> Vec<Evaluation> {
        self.shards.iter().filter_map(|shard| network.evaluate(weights, &shard.held_out, &self.schema)).collect()
    }

    /// `rounds` of FedAvg in f64, as a coordinator would.
    fn train(&self, network: &Network, spec: &TrainSpec, rounds: u64) -> Vec<f32> {
        let mut weights = network.initial(spec.seed);
        for round in 1..=rounds {
            let deltas = NAMES.iter().zip(&self.shards).map(|(name, shard)| {
                let trained =
                    network.train(&weights, &shard.training, spec, TaskKey { round, name }, &mut go_on).unwrap();
                (shard.training.len(), trained.into_delta(&weights).0)
            });
            let mean = weighted_mean(&deltas.collect::<Vec<_>>());
            weights.iter_mut().zip(mean).for_each(|(w, delta)| *w = (f64::from(*w) + delta) as f32);
        }
        weights
    }
}

fn go_on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn weighted_mean(parts: &[(usize, Numbers<f32>)]) -> Vec<f64> {
    let all: usize = parts.iter().map(|(rows, _)| rows).sum();
    let mut mean = vec![0.0; parts[0].1.len()];
    for (rows, values) in parts {
        mean.iter_mut().zip(&**values).for_each(|(m, v)| *m += f64::from(*v) * *rows as f64 / all as f64);
    }
    mean
}

fn models() -> [ModelSpec; 2] {
    [ModelSpec::Linear, ModelSpec::Mlp { hidden: vec![16, 8] }]
}

/// The same table with a number to be predicted, a class of three, and categories.
fn table_with(label: &str, of: impl Fn(f64) -> String) -> String {
    let mut lines = TABLE.lines();
    let header = lines.next().unwrap();
    let row = |line: &str| {
        let radius: f64 = line.split(',').next().unwrap().parse().unwrap();
        format!("{},{},{}\n", ["north", "south"][line.len() % 2], line.split_once(',').unwrap().1, of(radius))
    };
    format!("site,{},{label}\n", header.split_once(',').unwrap().1) + &lines.map(row).collect::<String>()
}

fn three_classes() -> String {
    table_with("size", |radius| {
        ["small", "middle", "large"][usize::from(radius > 12.0) + usize::from(radius > 15.0)].into()
    })
}

#[test]
fn full_batch_gradients_of_three_shards_are_full_batch_training_on_their_union() {
    let fleet = Fleet::new(TABLE);
    let union = fleet.union();
    let spec = TrainSpec { batch_size: BatchSize::Full, learning_rate: 0.1, ..TrainSpec::default() };
    for model in models() {
        let network = fleet.network(&model);
        let mut alone = network.initial(7);
        let mut together = alone.clone();
        for round in 1..=20 {
            let key = TaskKey { round, name: "" };
            alone = network.train(&alone, &union, &spec, key, &mut go_on).unwrap().weights.to_vec();
            let parts = NAMES.iter().zip(&fleet.shards).map(|(name, shard)| {
                let key = TaskKey { round, name };
                let gradient = network.gradient(&together, &shard.training, &spec, key, &mut go_on).unwrap();
                (shard.training.len(), gradient.values)
            });
            let mean = weighted_mean(&parts.collect::<Vec<_>>());
            together.iter_mut().zip(mean).for_each(|(w, g)| *w = (f64::from(*w) - 0.1 * g) as f32);
        }
        let apart = alone.iter().zip(&together).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart <= 1e-4, "{model:?}: a parameter differs by {apart}");
        assert_ne!(alone, network.initial(7), "{model:?} learned");
    }
}

#[test]
fn a_batch_in_parts_has_the_gradient_of_the_whole() {
    let fleet = Fleet::new(TABLE);
    let mut many = Rows::new(&fleet.schema);
    let union = fleet.union();
    for _ in 0..20 {
        many.append(&union.to_bytes(0, union.len()), &fleet.schema).unwrap();
    }
    let network = fleet.network(&models()[1]);
    let weights = network.initial(3);
    let spec = TrainSpec { batch_size: BatchSize::Full, ..TrainSpec::default() };
    let gradient = |rows| network.gradient(&weights, rows, &spec, TaskKey { round: 1, name: "" }, &mut go_on).unwrap();
    let (whole, parts) = (gradient(&union), gradient(&many));
    assert!(many.len() > 2 * 4096);
    assert!((whole.loss - parts.loss).abs() < 1e-6);
    assert!(whole.values.iter().zip(&*parts.values).all(|(a, b)| (a - b).abs() < 1e-6));
}

#[test]
fn federated_training_learns_and_gives_the_same_bits_again() {
    let fleet = Fleet::new(TABLE);
    for model in models() {
        let network = fleet.network(&model);
        let spec = TrainSpec { momentum: 0.5, ..TrainSpec::default() };
        let weights = fleet.train(&network, &spec, 10);
        assert_eq!(fleet.train(&network, &spec, 10), weights, "{model:?}");
        let summary = summarise(&fleet.evaluations(&network, &weights));
        assert_eq!(summary.count, 114);
        assert!(summary.accuracy.unwrap() > 0.92 && summary.auc.unwrap() > 0.96, "{model:?}: {summary:?}");
        let other = TrainSpec { seed: 8, ..spec };
        assert_ne!(fleet.train(&network, &other, 10), weights, "the seed decides");
    }
}

#[test]
fn the_merged_auc_is_within_a_thousandth_of_the_exact_one() {
    let fleet = Fleet::new(TABLE);
    for model in models() {
        let network = fleet.network(&model);
        // From an untrained model, whose scores crowd, to a sure one, whose scores spread.
        for (rounds, rate) in [(0, 0.1), (1, 0.001), (1, 0.05), (30, 0.1)] {
            let spec = TrainSpec { learning_rate: rate, ..TrainSpec::default() };
            let weights = fleet.train(&network, &spec, rounds);
            let (mut scores, mut positives, mut evaluations) = (Vec::new(), Vec::new(), Vec::new());
            for Shard { training, held_out } in &fleet.shards {
                for rows in [training, held_out] {
                    evaluations.extend(network.evaluate(&weights, rows, &fleet.schema));
                    scores.extend(network.predict(&weights, rows, &fleet.schema).iter().map(|p| p[1].ln() - p[0].ln()));
                    positives.extend(rows.targets().iter().map(|&y| y > 0.5));
                }
            }
            let (merged, exact) = (summarise(&evaluations).auc.unwrap(), auc(&scores, &positives).unwrap());
            assert_eq!(scores.len(), 569);
            assert!((merged - exact).abs() < 1e-3, "{model:?}, {rounds} rounds of {rate}: {merged} is not {exact}");
        }
    }
}

#[test]
fn more_than_two_classes_have_the_mean_area_of_one_against_rest() {
    let fleet = Fleet::new(&three_classes());
    let network = fleet.network(&models()[1]);
    let weights = fleet.train(&network, &TrainSpec::default(), 5);
    let summary = summarise(&fleet.evaluations(&network, &weights));
    let predicted: Vec<(Vec<f64>, f32)> = fleet
        .shards
        .iter()
        .flat_map(|shard| {
            let rows = &shard.held_out;
            network.predict(&weights, rows, &fleet.schema).into_iter().zip(rows.targets().iter().copied())
        })
        .collect();
    let area = |class: usize| {
        let scores: Vec<f64> = predicted.iter().map(|(p, _)| p[class]).collect();
        auc(&scores, &predicted.iter().map(|(_, y)| *y == class as f32).collect::<Vec<_>>()).unwrap()
    };
    let exact = (0..3).map(area).sum::<f64>() / 3.0;
    assert!((summary.auc.unwrap() - exact).abs() < 1e-3, "{summary:?}, exactly {exact}");
    assert!(predicted.iter().all(|(p, _)| (p.iter().sum::<f64>() - 1.0).abs() < 1e-9));
}

#[test]
fn regression_is_measured_in_the_targets_own_unit() {
    let fleet = Fleet::new(&table_with("radius", |radius| (100.0 * radius + 1000.0).to_string()));
    let network = fleet.network(&ModelSpec::Linear);
    let spec = TrainSpec { learning_rate: 0.01, ..TrainSpec::default() };
    let weights = fleet.train(&network, &spec, 10);
    let summary = summarise(&fleet.evaluations(&network, &weights));
    let (mut error, mut targets) = (0.0, Vec::new());
    for rows in fleet.shards.iter().map(|shard| &shard.held_out) {
        let truth = Rows::clone(rows);
        let tributary_learning::Target::Regression { mean, deviation } = fleet.schema.target else { panic!() };
        for (predicted, y) in network.predict(&weights, rows, &fleet.schema).iter().zip(truth.targets()) {
            let y = f64::from(*y) * deviation + mean;
            error += (predicted[0] - y).powi(2);
            targets.push(y);
        }
    }
    let mean = targets.iter().sum::<f64>() / targets.len() as f64;
    let spread: f64 = targets.iter().map(|y| (y - mean).powi(2)).sum();
    let rmse = (error / targets.len() as f64).sqrt();
    assert!((summary.rmse.unwrap() / rmse - 1.0).abs() < 1e-6, "{summary:?}, exactly {rmse}");
    assert!((summary.r2.unwrap() - (1.0 - error / spread)).abs() < 1e-6);
    assert!(summary.r2.unwrap() > 0.95 && summary.auc.is_none() && summary.accuracy.is_none(), "{summary:?}");
}

#[test]
fn training_that_diverges_says_so_and_training_that_is_stopped_ends() {
    let fleet = Fleet::new(&table_with("radius", |radius| radius.to_string()));
    let network = fleet.network(&models()[1]);
    let rows = &fleet.shards[2].training;
    let key = TaskKey { round: 1, name: "c" };
    let wild = TrainSpec { learning_rate: 1e6, ..TrainSpec::default() };
    let start = network.initial(7);
    assert!(matches!(network.train(&start, rows, &wild, key, &mut go_on), Err(Stopped::NotFinite { .. })));
    // Only the weights tell of a last step that went wrong: its loss was taken before.
    let wildest = TrainSpec { learning_rate: f64::MAX, batch_size: BatchSize::Full, local_epochs: 1, ..wild };
    let stopped = network.train(&start, rows, &wildest, key, &mut go_on);
    assert_eq!(stopped, Err(Stopped::NotFinite { steps: 0 }));
    let mut seen = 0;
    let stop = network.train(&start, rows, &TrainSpec::default(), key, &mut |passes| {
        seen = passes;
        if passes == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((stop.unwrap_err(), seen), (Stopped::Cancelled, 3));
    let nan = vec![f32::NAN; start.len()];
    assert_eq!(network.evaluate(&nan, rows, &fleet.schema), None);
    assert!(network.gradient(&nan, rows, &TrainSpec::default(), key, &mut go_on).is_err());
}

#[test]
fn a_task_without_rows_changes_nothing() {
    let fleet = Fleet::new(TABLE);
    let network = fleet.network(&models()[1]);
    let (start, none) = (network.initial(7), Rows::new(&fleet.schema));
    let key = TaskKey { round: 1, name: "a" };
    let trained = network.train(&start, &none, &TrainSpec::default(), key, &mut go_on).unwrap();
    assert_eq!((trained.steps, trained.into_delta(&start)), (0, (vec![0.0; start.len()].into(), 0.0)));
    assert_eq!(network.evaluate(&start, &none, &fleet.schema), None);
    assert!(
        network
            .gradient(&start, &none, &TrainSpec::default(), key, &mut go_on)
            .unwrap()
            .values
            .iter()
            .all(|g| *g == 0.0)
    );
}

#[test]
fn initial_weights_are_drawn_within_their_bounds() {
    let fleet = Fleet::new(TABLE);
    assert!(fleet.network(&ModelSpec::Linear).initial(7).iter().all(|w| *w == 0.0));
    let network = fleet.network(&ModelSpec::Mlp { hidden: vec![64] });
    let names: Vec<&str> = network.layout().tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["layer00.bias", "layer00.weight", "layer01.bias", "layer01.weight"]);
    let weights = network.initial(7);
    assert_eq!(weights.len() as u64, network.layout().parameters());
    let first = &weights[64..64 + 64 * 30];
    let bound = (6.0f64 / 30.0).sqrt();
    assert!(first.iter().all(|w| f64::from(w.abs()) <= bound));
    // A uniform distribution's L2 norm is bound·√(n / 3).
    assert!((norm(first) / (bound * (first.len() as f64 / 3.0).sqrt()) - 1.0).abs() < 0.05);
    assert_ne!(network.initial(8), weights);
}

/// A saved model, and the directory it was saved to.
fn save(fleet: &Fleet, spec: ModelSpec) -> (SavedModel, PathBuf) {
    let network = fleet.network(&spec);
    let weights = fleet.train(&network, &TrainSpec::default(), 3);
    let metrics: EvaluationSummary = summarise(&fleet.evaluations(&network, &weights));
    let model = SavedModel::new(spec, fleet.schema.clone(), metrics, weights).unwrap();
    let dir = fleet.dir.path().join("model");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("model.safetensors"), model.weights_file()).unwrap();
    fs::write(dir.join("model.json"), model.description_file()).unwrap();
    (model, dir)
}

fn predict(model: &SavedModel, data: &Path) -> Result<String, String> {
    let mut out = Vec::new();
    let result = model.predict_file(data, &mut out).map_err(|error| error.to_string());
    result.map(|_| String::from_utf8(out).unwrap())
}

#[test]
fn a_saved_model_is_read_back_bit_for_bit_and_a_foreign_pair_is_refused() {
    let fleet = Fleet::new(&three_classes());
    let (model, dir) = save(&fleet, models()[1].clone());
    let back = SavedModel::read(&dir).unwrap();
    assert_eq!((back.hash(), back.weights(), back.metrics()), (model.hash(), model.weights(), model.metrics()));
    assert_eq!(back.schema(), model.schema());
    let json: serde_json::Value = serde_json::from_slice(&model.description_file()).unwrap();
    assert_eq!(json["model_hash"], model.hash().to_string());
    assert_eq!(json["schema"]["target"]["classification"]["classes"][0], "large");

    let mut file = model.weights_file();
    let last = file.len() - 1;
    file[last] ^= 1;
    fs::write(dir.join("model.safetensors"), &file).unwrap();
    let refused = SavedModel::read(&dir).unwrap_err().to_string();
    assert!(refused.contains("not the weights that model.json describes: their hash is"), "{refused}");
    fs::write(dir.join("model.json"), br#"{"format":"tributary model 9"}"#).unwrap();
    let refused = SavedModel::read(&dir).unwrap_err().to_string();
    assert!(refused.contains("format \"tributary model 9\", this program reads \"tributary model 1\""), "{refused}");
    fs::remove_file(dir.join("model.json")).unwrap();
    assert!(SavedModel::read(&dir).unwrap_err().to_string().contains("--model names a directory with"));
}

#[test]
fn predictions_keep_every_column_and_row_and_need_no_label() {
    let fleet = Fleet::new(&three_classes());
    let (_, dir) = save(&fleet, models()[1].clone());
    let model = SavedModel::read(&dir).unwrap();
    let table = three_classes();
    let (header, row) = (table.lines().next().unwrap(), table.lines().nth(1).unwrap());
    let data = fleet.dir.path().join("new.csv");
    let write = |text: String| fs::write(&data, text).unwrap();

    // A note with a comma and a newline, no label, an unseen site, a missing one.
    let unlabelled = |line: &str| line.rsplit_once(',').unwrap().0.to_owned();
    let unseen = row.replacen("north", "west", 1).replacen("south", "west", 1);
    let missing = format!("?{}", &row[row.find(',').unwrap()..]);
    let note = "\"a, \"\"b\"\"\nc\"";
    write(format!(
        "note,{}\n{note},{}\n 4.0 ,{}\n,{}\n",
        unlabelled(header),
        unlabelled(row),
        unlabelled(&unseen),
        unlabelled(&missing)
    ));
    let out = predict(&model, &data).unwrap();
    let mut reader = csv::Reader::from_reader(out.as_bytes());
    let names: Vec<String> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    assert_eq!(
        names[names.len() - 4..],
        ["prediction", "probability_large", "probability_middle", "probability_small"]
    );
    let records: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(records.len(), 3);
    assert_eq!((&records[0][0], &records[1][0], &records[2][0]), ("a, \"b\"\nc", " 4.0 ", ""));
    assert_eq!((&records[1][1], &records[2][1]), ("west", "?"));
    let probabilities: Vec<f64> = (33..36).map(|at| records[0][at].parse().unwrap()).collect();
    assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-6);
    let best = probabilities.iter().copied().fold(0.0, f64::max);
    let of_best = names[33..].iter().zip(&probabilities).find(|(_, p)| **p == best).unwrap().0;
    assert_eq!(*of_best, format!("probability_{}", &records[0][32]));

    write(table.clone());
    let lines = predict(&model, &data).unwrap();
    assert_eq!(lines.lines().count(), 570, "the label may be there");
    let unchanged = lines.lines().zip(table.lines()).all(|(out, input)| out.starts_with(&format!("{input},")));
    assert!(unchanged);
    write(format!("{}\n{}\n", header.replacen("site", "place", 1), row));
    let refused = predict(&model, &data).unwrap_err();
    assert!(
        refused.contains("new.csv: no column \"site\", which the fleet's schema has; there are \"place\""),
        "{refused}"
    );
    write(format!("{header},prediction\n{row},1\n"));
    assert!(predict(&model, &data).unwrap_err().contains("new.csv:1: column \"prediction\" is what"));
    write(format!("{header}\n{}\n", row.split_once(',').map(|(site, rest)| format!("{site},wide{rest}")).unwrap()));
    let refused = predict(&model, &data).unwrap_err();
    assert!(refused.contains("new.csv:2: column \"mean_texture\": \"wide"), "{refused}");
    write(format!("{header}\n"));
    assert!(predict(&model, &data).unwrap_err().ends_with("has a header and no rows, expected at least one"));
}

#[test]
fn a_number_is_predicted_in_its_own_unit() {
    let fleet = Fleet::new(&table_with("radius", |radius| (100.0 * radius + 1000.0).to_string()));
    let (_, dir) = save(&fleet, ModelSpec::Linear);
    let model = SavedModel::read(&dir).unwrap();
    let out = predict(&model, &fleet.dir.path().join("a.csv")).unwrap();
    let mut lines = out.lines();
    assert!(lines.next().unwrap().ends_with(",radius,prediction"));
    for line in lines {
        let mut last = line.rsplit(',').map(|cell| cell.parse::<f64>().unwrap());
        let (predicted, actual) = (last.next().unwrap(), last.next().unwrap());
        assert!((predicted - actual).abs() < 600.0, "{predicted} for {actual}");
    }
}
