//! Every mode with every kind of model and task, end to end, and what each mode promises.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use coordinator::config::{Config, Overrides};
use learning::{Dataset, Frozen, MIN_COUNT, Network, Rows, SavedModel, Shard, Table, TaskKey, merge};
use protocol::draw::Draw;
use protocol::plan::{LearningPlan, TrainSpec};
use tributary_tests::home::PATIENCE;
use tributary_tests::{Fleet, data, ended_well, not_tested};

/// Rounds and step that are enough for each mode: a round of `gradient` is one step, of the others an epoch.
fn config(mode: &str, model: &str, label: &str) -> String {
    let train = match mode {
        "gradient" => "rounds = 60\nbatch_size = \"full\"\nlearning_rate = 0.1\nmomentum = 0.9",
        _ => "rounds = 4\nlocal_epochs = 3\nbatch_size = 16\nlearning_rate = 0.1",
    };
    let hidden = if model == "mlp" { "hidden = [16]\n" } else { "" };
    format!("[data]\nlabel = \"{label}\"\n[model]\nkind = \"{model}\"\n{hidden}[train]\nmode = \"{mode}\"\n{train}\n")
}

fn learns(mode: &str, model: &str, label: &str, make: fn(u64, usize) -> String, figure: &str, at_least: f64) {
    let fleet = Fleet::new(&config(mode, model, label), [("a", make(1, 250)), ("b", make(2, 200))]);
    let args: &[&str] = if mode == "central" { &["--share-rows"] } else { &[] };
    let done = fleet.train(args).done;
    let got = done["eval"][figure].as_f64().unwrap();
    eprintln!("{mode} {model} {label}: {figure} {got:.4}");
    assert!(got >= at_least, "{mode} {model} {label}: {figure} is {got}: {done}");
}

fn learns_everything(mode: &str, model: &str) {
    learns(mode, model, "label", data::classes, "auc", 0.95);
    learns(mode, model, "size", data::sizes, "accuracy", 0.85);
    learns(mode, model, "y", data::numbers, "r2", 0.95);
}

#[test]
fn federated_linear_models_learn_classes_and_numbers() {
    learns_everything("federated", "linear");
}

#[test]
fn federated_mlps_learn_classes_and_numbers() {
    learns_everything("federated", "mlp");
}

#[test]
fn gradient_linear_models_learn_classes_and_numbers() {
    learns_everything("gradient", "linear");
}

#[test]
fn gradient_mlps_learn_classes_and_numbers() {
    learns_everything("gradient", "mlp");
}

#[test]
fn central_linear_models_learn_classes_and_numbers() {
    learns_everything("central", "linear");
}

#[test]
fn central_mlps_learn_classes_and_numbers() {
    learns_everything("central", "mlp");
}

#[test]
fn a_worker_whose_owner_does_not_share_rows_leaves_at_once_and_the_fleet_waits() {
    let fleet = Fleet::new(&config("central", "linear", "label"), crate::runs::two());
    let mut coordinator = fleet.coordinator(&["--exit-when-done"]);
    let willing = fleet.worker("a", &["--share-rows"]);
    let said = fleet.worker("b", &[]).end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.starts_with("error: ") && said.stderr.contains("--share-rows"), "{}", said.stderr);
    assert!(said.lines("round").is_empty(), "it did nothing: {}", said.stdout);
    coordinator.until_where("gone", |gone| gone["name"] == "b");
    let willing_too = fleet.worker("b", &["--share-rows"]);
    [willing, willing_too].into_iter().for_each(|worker| drop(ended_well(worker)));
    assert_eq!(ended_well(coordinator).lines("done").len(), 1);
}

/// The fleet's plan and encoding, made here from the same files.
struct Reference {
    plan: LearningPlan,
    frozen: Frozen,
    shards: Vec<Shard>,
}

impl Reference {
    fn new(fleet: &Fleet) -> Self {
        let config = fleet.home().path("run.toml");
        let plan = Config::load(Some(&config), |_| None, Overrides::default()).unwrap().plan.learning;
        let dataset = |name: &&str| {
            let table = Table::read(&fleet.home().path(format!("{name}.csv"))).unwrap();
            Dataset::new(table, &plan.data, None, plan.train.seed, name).unwrap()
        };
        let mut datasets: Vec<Dataset> = fleet.names().iter().map(dataset).collect();
        let surveys = datasets.iter_mut().map(|dataset| dataset.survey(MIN_COUNT).unwrap());
        let surveys: BTreeMap<String, _> = fleet.names().iter().map(ToString::to_string).zip(surveys).collect();
        let frozen = merge(&surveys, &plan.data).unwrap();
        let shards = datasets.iter().map(|dataset| dataset.encode(&frozen.schema).unwrap()).collect();
        Self { plan, frozen, shards }
    }

    /// The training rows of all, one worker's after the other's.
    fn union(&self) -> Rows {
        let mut union = Rows::new(&self.frozen.schema);
        for Shard { training, .. } in &self.shards {
            union.append(&training.to_bytes(0, training.len()), &self.frozen.schema).unwrap();
        }
        union
    }

    /// Full-batch training on the union: one step of momentum SGD a round.
    fn train(&self) -> Vec<f32> {
        let network = Network::new(&self.plan.model, &self.frozen.schema).unwrap();
        let start = network.initial(self.plan.train.seed);
        let spec = TrainSpec { local_epochs: self.plan.train.rounds, ..self.plan.train.clone() };
        let key = TaskKey { round: 1, name: "" };
        network.train(&start, &self.union(), &spec, key, &mut |_| ControlFlow::Continue(())).unwrap().weights.to_vec()
    }
}

fn gradient_equals_the_union(model: &str) {
    let config = format!(
        "[model]\n{model}\n[train]\nmode = \"gradient\"\nrounds = 20\nbatch_size = \"full\"\nlearning_rate = 0.2\n\
         momentum = 0.9\n"
    );
    let fleet =
        Fleet::new(&config, [("a", data::classes(1, 400)), ("b", data::classes(2, 100)), ("c", data::classes(3, 37))]);
    let reference = Reference::new(&fleet);
    let told = fleet.train(&[]);
    let saved = SavedModel::read(&fleet.home().state().join("model")).unwrap();
    assert_eq!(saved.schema(), &reference.frozen.schema);
    assert_eq!(told.rounds.len(), 20);
    let start = saved.network().initial(reference.plan.train.seed);
    let (expected, got) = (reference.train(), saved.weights());
    let largest = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let difference = largest(&expected, got);
    eprintln!("{model}: {} parameters, largest difference {difference:e} after 20 rounds", got.len());
    assert_eq!(expected.len(), got.len());
    assert!(difference <= 1e-4, "{model}: {difference}");
    assert!(largest(&start, got) > 0.1, "{model} has learned nothing, so the comparison says nothing");
}

#[test]
fn full_gradients_of_a_linear_model_equal_training_on_the_union() {
    gradient_equals_the_union("kind = \"linear\"");
}

#[test]
fn full_gradients_of_an_mlp_equal_training_on_the_union() {
    gradient_equals_the_union("kind = \"mlp\"\nhidden = [16, 8]");
}

/// What may be in no file: its bytes and what it is.
struct Canaries {
    /// By the first four bytes.
    by_start: HashMap<[u8; 4], Vec<(Vec<u8>, String)>>,
}

impl Canaries {
    fn new(canaries: impl IntoIterator<Item = (Vec<u8>, String)>) -> Self {
        let mut by_start: HashMap<[u8; 4], Vec<_>> = HashMap::new();
        for (bytes, what) in canaries {
            by_start.entry(bytes[..4].try_into().unwrap()).or_default().push((bytes, what));
        }
        Self { by_start }
    }

    /// What is found in `bytes`.
    fn found_in(&self, bytes: &[u8]) -> Vec<&str> {
        let candidates = |at: usize| self.by_start.get(&bytes[at..at + 4]).into_iter().flatten().map(move |c| (at, c));
        let all = (0..bytes.len().saturating_sub(3)).flat_map(candidates);
        all.filter(|(at, (canary, _))| bytes[*at..].starts_with(canary)).map(|(_, (_, what))| what.as_str()).collect()
    }
}

/// Two peculiar numbers side by side in each encoded row, each row's first number as it stands in the file and as an
/// `f64`, and a category that so few rows have that it is never named.
fn canaries(text: &str, rows: &Rows) -> Canaries {
    let encoded = (0..rows.len()).map(|at| {
        let row = rows.to_bytes(at, at + 1);
        let cells: Vec<f32> = row.chunks(4).map(|cell| f32::from_le_bytes(cell.try_into().unwrap())).collect();
        let pair = cells.windows(2).position(|pair| pair.iter().all(|cell| cell.fract() != 0.0)).unwrap();
        (row[4 * pair..4 * pair + 8].to_vec(), format!("encoded row {at}"))
    });
    let cells = text.lines().skip(1).map(|line| line.split(',').next().unwrap());
    let texts = cells.clone().map(|cell| (cell.as_bytes().to_vec(), format!("cell {cell}")));
    let numbers = cells.map(|cell| (cell.parse::<f64>().unwrap().to_le_bytes().to_vec(), format!("number {cell}")));
    Canaries::new(encoded.chain(texts).chain(numbers).chain([(RARE.into(), RARE.to_owned())]))
}

const RARE: &str = "zanzibar-heliotrope";

/// As [`data::classes`], with more digits and a category that three rows have.
fn peculiar_classes(rows: usize) -> String {
    let mut draw = Draw::new(77, "test canaries", 0, "");
    let mut text = "x0,x1,colour,label\n".to_owned();
    for row in 0..rows {
        let (x0, x1) = (draw.uniform() * 4.0 - 2.0, draw.uniform() * 4.0 - 2.0);
        let colour = if row % (rows / 3) == 7 { RARE } else { ["red", "green"][row % 2] };
        let _ = writeln!(text, "{x0:.10},{x1:.10},{colour},{}", u8::from(2.0 * x0 > x1));
    }
    text
}

/// The bytes of all files below `directory`, and of those without a name that the process has open there.
fn bytes_on_disk(directory: &Path, process: u32) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        // What goes away while we look was written, renamed or removed just now; the next look sees what it became.
        for entry in std::fs::read_dir(directory).into_iter().flatten().map_while(Result::ok) {
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => directories.push(entry.path()),
                kind if kind.is_file() => {
                    files.extend(
                        std::fs::read(entry.path()).ok().map(|bytes| (entry.path().display().to_string(), bytes)),
                    );
                }
                _ => {}
            }
        }
    }
    for entry in std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().map_while(Result::ok) {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        if target.starts_with(directory) && target.to_string_lossy().ends_with(" (deleted)") {
            files.extend(std::fs::read(entry.path()).ok().map(|bytes| (target.display().to_string(), bytes)));
        }
    }
    files
}

fn assert_no_row_in(canaries: &Canaries, directory: &Path, process: u32) -> usize {
    let files = bytes_on_disk(directory, process);
    for (name, bytes) in &files {
        let found = canaries.found_in(bytes);
        assert!(found.is_empty(), "{name} holds {found:?}");
    }
    files.iter().filter(|(name, _)| name.ends_with(" (deleted)")).map(|(_, bytes)| bytes.len()).max().unwrap_or(0)
}

#[test]
fn central_keeps_no_row_in_the_clear_on_disk() {
    let (text, rounds) = (peculiar_classes(10_000), 4);
    let config = format!(
        "[model]\nkind = \"linear\"\n[train]\nmode = \"central\"\nrounds = {rounds}\nbatch_size = 256\n[data]\n\
         validation_fraction = 0.1\n"
    );
    let fleet = Fleet::new(&config, [("a", text.clone()), ("b", data::classes(1, 30_000))]);
    let mut shards = Reference::new(&fleet).shards;
    let examples: usize = shards.iter().map(|shard| shard.training.len()).sum();
    let shard = shards.remove(0).training;
    let (canaries, rows) = (canaries(&text, &shard), shard.to_bytes(0, shard.len()));
    let state = fleet.home().state();

    let mut coordinator = fleet.coordinator(&["--exit-when-done"]);
    let workers = fleet.workers(&["--share-rows"]);
    coordinator.until_where("stage", |line| line["stage"] == "sharing");
    // The many rows of one take their time, and now more of it: those of the other wait for them in the spool.
    workers[1].signal("STOP");
    see_the_spool(&canaries, &state, coordinator.id(), rows.len());
    workers[1].signal("CONT");
    for round in 1..=rounds {
        let line = coordinator.until("round");
        assert_eq!((&line["round"], &line["examples"]), (&round.into(), &examples.into()));
        assert_no_row_in(&canaries, &state, coordinator.id());
    }
    let process = coordinator.id();
    workers.into_iter().chain([coordinator]).for_each(|process| drop(ended_well(process)));
    assert_no_row_in(&canaries, &state, process);
    the_search_finds_what_is_there(&canaries, &state, &rows, &text);
}

/// Searches until something that is as long as the rows has been searched.
fn see_the_spool(canaries: &Canaries, state: &Path, process: u32, length: usize) {
    if !Path::new("/proc/self/fd").exists() {
        return not_tested("the spool of central mode: its files have no names, and there is no /proc to see them in");
    }
    let deadline = Instant::now() + PATIENCE;
    while assert_no_row_in(canaries, state, process) < length {
        assert!(Instant::now() < deadline, "no spool of {length} bytes");
    }
}

fn the_search_finds_what_is_there(canaries: &Canaries, state: &Path, rows: &[u8], text: &str) {
    let file = state.join("runs/planted");
    for (planted, at_least) in [(rows, 9000), (text.as_bytes(), 10_000), (format!("…{RARE}…").as_bytes(), 1)] {
        std::fs::write(&file, planted).unwrap();
        let files = bytes_on_disk(state, 0);
        let (_, bytes) = files.iter().find(|(name, _)| Path::new(name) == file).unwrap();
        assert!(canaries.found_in(bytes).len() >= at_least);
    }
}

#[test]
fn after_a_power_cut_the_rows_are_shared_again_and_the_model_is_the_same() {
    let config = config("central", "mlp", "label").replace("rounds = 4", "rounds = 60");
    let undisturbed = Fleet::new(&config, crate::runs::two()).train(&["--share-rows"]);
    let fleet = Fleet::new(&config, crate::runs::two());
    let mut coordinator = fleet.coordinator(&["--exit-when-done"]);
    let workers = fleet.workers(&["--share-rows"]);
    let line = coordinator.until("round");
    [coordinator].into_iter().chain(workers).for_each(|mut process| process.kill());

    let told = fleet.train(&["--share-rows"]);
    assert!(told.rounds[0]["round"].as_u64() >= line["round"].as_u64(), "it goes on: {:?}", told.rounds);
    assert_eq!(told.done["model_hash"], undisturbed.done["model_hash"]);
}
