//! From what was typed to a [`Plan`]: the TOML file, the environment over it, the flags over both.
//!
//! Every key of the file is in [`KEYS`] and has a variable: `train.learning_rate` is
//! `TRIBUTARY_TRAIN_LEARNING_RATE`, its value written as in the file (quotes around a string may be left out). A key
//! that is not in the table is refused with the nearest one that is. Each error names the place: the file and its
//! line, the variable, or the flag. What ranges values have is [`Plan::new`]'s to say; what makes no sense together
//! is said here.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use protocol::plan::{
    BatchSize, DataSpec, Durability, LearningPlan, LearningTask, Mode, ModelSpec, Plan, PlanError, RoundsSpec,
    Strategy, TrainSpec,
};
use toml::de::{DeTable, DeValue};

/// Every key that the file may have.
pub const KEYS: &[&str] = &[
    "data.label",
    "data.task",
    "data.drop",
    "data.categorical",
    "data.validation_fraction",
    "model.kind",
    "model.hidden",
    "train.mode",
    "train.rounds",
    "train.local_epochs",
    "train.batch_size",
    "train.optimizer",
    "train.learning_rate",
    "train.momentum",
    "train.seed",
    "strategy.kind",
    "rounds.min_workers",
    "rounds.fraction",
    "rounds.over_select",
    "rounds.quorum",
    "rounds.deadline_s",
    "rounds.durability",
    "limits.connections",
    "tls.strict_pq",
];

/// The most connections that a coordinator can be told to hold: ten for each worker that it can know.
pub const CONNECTIONS_MAX: u32 = 1_000_000;

/// The longest config file that is read, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What a coordinator was told to do, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What is trained, and how its rounds are run.
    pub plan: Plan,
    /// Connections at once, those that are beginning or ending included.
    pub connections_max: usize,
    /// Whether peers without a post-quantum key exchange are refused.
    pub strict_pq: bool,
}

/// The flags that win over the file and the environment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overrides {
    /// `--rounds`.
    pub rounds: Option<u32>,
    /// `--min-workers`.
    pub min_workers: Option<u32>,
}

/// Why what was typed is no plan.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: cannot read the config: {source}")]
    Unreadable {
        /// The file.
        file: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The file is longer than any config.
    #[error("{file}: longer than {CONFIG_BYTES_MAX} bytes, so no config")]
    TooLong {
        /// The file.
        file: String,
    },
    /// The file is not TOML.
    #[error("{place}: not TOML: {message}")]
    Syntax {
        /// Where.
        place: String,
        /// What the parser says.
        message: String,
    },
    /// A key that is not in the table.
    #[error("{place}: unknown key {key}{}", nearest_hint(.nearest.as_deref()))]
    UnknownKey {
        /// Where.
        place: String,
        /// The key, with its section.
        key: String,
        /// The known key that it looks most like.
        nearest: Option<String>,
    },
    /// A value of the wrong type, out of its range, or without sense beside another.
    #[error("{place}: {key} is {got}, expected {expected}")]
    Value {
        /// Where.
        place: String,
        /// The key, with its section.
        key: String,
        /// The value as it was written.
        got: String,
        /// What would be accepted.
        expected: String,
    },
}

fn nearest_hint(nearest: Option<&str>) -> String {
    nearest.map(|key| format!("; did you mean {key}?")).unwrap_or_default()
}

impl Config {
    /// Reads the file if there is one, lets `environment` win over it and `flags` over both, and checks everything.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn load(
        file: Option<&Path>,
        environment: impl Fn(&str) -> Option<String>,
        flags: Overrides,
    ) -> Result<Self, ConfigError> {
        let name = file.map(|path| path.display().to_string()).unwrap_or_default();
        let text = match file {
            Some(path) => read(path, &name)?,
            None => String::new(),
        };
        Self::parse(&name, &text, environment, flags)
    }

    /// As [`Self::load`], with the file's text already in hand; `name` is how errors call it.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn parse(
        name: &str,
        text: &str,
        environment: impl Fn(&str) -> Option<String>,
        flags: Overrides,
    ) -> Result<Self, ConfigError> {
        let mut settings = Settings::default();
        settings.add_file(name, text)?;
        settings.add_environment(environment);
        settings.add_flag("train.rounds", "--rounds", flags.rounds);
        settings.add_flag("rounds.min_workers", "--min-workers", flags.min_workers);
        let learning = LearningPlan {
            data: settings.data()?,
            model: settings.model()?,
            train: settings.train()?,
            strategy: settings.strategy()?,
        };
        let rounds = settings.rounds()?;
        let strict_pq = settings.get::<bool>("tls.strict_pq")?.unwrap_or(false);
        let plan = Plan::new(learning, rounds).map_err(|error| settings.out_of_range(error))?;
        let connections_max = settings.connections(plan.rounds.min_workers)?;
        Ok(Self { plan, connections_max, strict_pq })
    }
}

fn read(path: &Path, name: &str) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { file: name.to_owned(), source };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut text = String::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLong { file: name.to_owned() });
    }
    Ok(text)
}

/// A value as TOML has it, apart from its text.
#[derive(Debug)]
enum Typed {
    Text(String),
    Whole(i128),
    Real(f64),
    Truth(bool),
    List(Vec<Self>),
    /// A date or a table, which no key takes.
    Other,
}

impl From<&DeValue<'_>> for Typed {
    fn from(value: &DeValue<'_>) -> Self {
        match value {
            DeValue::String(text) => Self::Text(text.to_string()),
            DeValue::Integer(n) => i128::from_str_radix(n.as_str(), n.radix()).map_or(Self::Other, Self::Whole),
            DeValue::Float(x) => x.as_str().parse().map_or(Self::Other, Self::Real),
            DeValue::Boolean(truth) => Self::Truth(*truth),
            DeValue::Array(items) => Self::List(items.iter().map(|item| item.get_ref().into()).collect()),
            DeValue::Datetime(_) | DeValue::Table(_) => Self::Other,
        }
    }
}

/// A value that was given, as it was written, and where.
#[derive(Debug)]
struct Setting {
    place: String,
    written: String,
    value: Typed,
}

/// All that was given, by key; what wins stands alone.
#[derive(Debug, Default)]
struct Settings(BTreeMap<&'static str, Setting>);

impl Settings {
    fn add_file(&mut self, name: &str, text: &str) -> Result<(), ConfigError> {
        let place = |at: usize| format!("{name}:{}", text[..at].matches('\n').count() + 1);
        let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            place: place(error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        for (section, table) in document.into_inner() {
            let at = place(section.span().start);
            let written = &text[table.span()];
            let section = section.into_inner();
            let table = keys_of(at, &section, written, table.into_inner())?;
            for (key, value) in table {
                let place = place(key.span().start);
                let full = format!("{section}.{}", key.into_inner());
                let Some(known) = KEYS.iter().find(|known| **known == full) else {
                    return Err(unknown(place, &full));
                };
                let written = text[value.span()].to_owned();
                self.0.insert(known, Setting { place, written, value: value.get_ref().into() });
            }
        }
        Ok(())
    }

    fn add_environment(&mut self, environment: impl Fn(&str) -> Option<String>) {
        for key in KEYS {
            let place = variable(key);
            let Some(written) = environment(&place) else { continue };
            let value = match DeValue::parse(&written) {
                Ok(value) => value.get_ref().into(),
                Err(_) => Typed::Text(written.clone()),
            };
            self.0.insert(key, Setting { place, written, value });
        }
    }

    fn add_flag(&mut self, key: &'static str, flag: &str, value: Option<u32>) {
        let Some(value) = value else { return };
        let (written, value) = (value.to_string(), Typed::Whole(value.into()));
        self.0.insert(key, Setting { place: flag.to_owned(), written, value });
    }

    /// The value of `key`, if it was given.
    fn get<T: Value>(&self, key: &'static str) -> Result<Option<T>, ConfigError> {
        let Some(setting) = self.0.get(key) else { return Ok(None) };
        match T::read(&setting.value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.refuse(key, T::EXPECTED)),
        }
    }

    /// The value of `key` among `choices`, if it was given.
    fn choose<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Result<Option<T>, ConfigError> {
        let names = || choices.iter().map(|(name, _)| format!("{name:?}")).collect::<Vec<_>>().join(" or ");
        let Some(setting) = self.0.get(key) else { return Ok(None) };
        let chosen = choices.iter().find(|(name, _)| matches!(&setting.value, Typed::Text(text) if text == name));
        chosen.map(|(_, choice)| Some(*choice)).ok_or_else(|| self.refuse(key, &names()))
    }

    fn refuse(&self, key: &'static str, expected: &str) -> ConfigError {
        let (place, got) = match self.0.get(key) {
            Some(setting) => (setting.place.clone(), setting.written.clone()),
            None => ("config".to_owned(), "not given".to_owned()),
        };
        ConfigError::Value { place, key: key.to_owned(), got, expected: expected.to_owned() }
    }

    fn out_of_range(&self, error: PlanError) -> ConfigError {
        // As it was written, which the operator can look for; a default has a form of its own.
        let setting = self.0.get(error.key);
        let place = setting.map_or_else(|| "config".to_owned(), |setting| setting.place.clone());
        let got = setting.map_or(error.got, |setting| setting.written.clone());
        ConfigError::Value { place, key: error.key.to_owned(), got, expected: error.expected }
    }

    fn data(&self) -> Result<DataSpec, ConfigError> {
        let tasks = [("classification", LearningTask::Classification), ("regression", LearningTask::Regression)];
        let default = DataSpec::default();
        Ok(DataSpec {
            label: self.get("data.label")?,
            task: self.choose("data.task", &tasks)?,
            drop: self.get("data.drop")?.unwrap_or(default.drop),
            categorical: self.get("data.categorical")?.unwrap_or(default.categorical),
            validation_fraction: self.get("data.validation_fraction")?.unwrap_or(default.validation_fraction),
        })
    }

    fn model(&self) -> Result<ModelSpec, ConfigError> {
        let linear = self.choose("model.kind", &[("linear", true), ("mlp", false)])?.unwrap_or(false);
        match (linear, self.get::<Vec<u32>>("model.hidden")?) {
            (true, None) => Ok(ModelSpec::Linear),
            (true, Some(_)) => Err(self.refuse("model.hidden", "no such key beside kind = \"linear\"")),
            (false, Some(hidden)) => Ok(ModelSpec::Mlp { hidden }),
            (false, None) => Ok(ModelSpec::default()),
        }
    }

    fn train(&self) -> Result<TrainSpec, ConfigError> {
        let modes = [("federated", Mode::Federated), ("gradient", Mode::Gradient), ("central", Mode::Central)];
        let default = TrainSpec::default();
        self.choose("train.optimizer", &[("sgd", ())])?;
        let train = TrainSpec {
            mode: self.choose("train.mode", &modes)?.unwrap_or(default.mode),
            rounds: self.get("train.rounds")?.unwrap_or(default.rounds),
            local_epochs: self.get("train.local_epochs")?.unwrap_or(default.local_epochs),
            batch_size: self.get("train.batch_size")?.unwrap_or(default.batch_size),
            learning_rate: self.get("train.learning_rate")?.unwrap_or(default.learning_rate),
            momentum: self.get("train.momentum")?.unwrap_or(default.momentum),
            seed: self.get("train.seed")?.unwrap_or(default.seed),
        };
        if train.mode == Mode::Gradient && train.local_epochs != 1 {
            return Err(self.refuse("train.local_epochs", "1: in mode \"gradient\" a round is one batch"));
        }
        Ok(train)
    }

    fn strategy(&self) -> Result<Strategy, ConfigError> {
        Ok(self.choose("strategy.kind", &[("fedavg", Strategy::FedAvg)])?.unwrap_or_default())
    }

    fn rounds(&self) -> Result<RoundsSpec, ConfigError> {
        let default = RoundsSpec::default();
        let deadline = self.get::<f64>("rounds.deadline_s")?;
        let deadline = deadline.map(Duration::try_from_secs_f64).transpose();
        Ok(RoundsSpec {
            min_workers: self.get("rounds.min_workers")?,
            fraction: self.get("rounds.fraction")?.unwrap_or(default.fraction),
            over_select: self.get("rounds.over_select")?.unwrap_or(default.over_select),
            quorum: self.get("rounds.quorum")?.unwrap_or(default.quorum),
            deadline: deadline.map_err(|_| self.refuse("rounds.deadline_s", "1 to 604800 seconds"))?,
            durability: self
                .choose("rounds.durability", &[("round", Durability::Round), ("update", Durability::Update)])?
                .unwrap_or_default(),
        })
    }

    /// No fewer than there must be workers for a run to begin.
    fn connections(&self, min_workers: Option<u32>) -> Result<usize, ConfigError> {
        let Some(connections) = self.get::<u32>("limits.connections")? else {
            return Ok(transport::limits::CONNECTIONS_MAX);
        };
        let least = min_workers.unwrap_or(1);
        if !(least..=CONNECTIONS_MAX).contains(&connections) {
            let expected = format!("{least} to {CONNECTIONS_MAX}, as many as workers that must be in or more");
            return Err(self.refuse("limits.connections", &expected));
        }
        // On a machine whose usize is smaller, memory ends first.
        Ok(usize::try_from(connections).unwrap_or(usize::MAX))
    }
}

/// The keys of a section, if the value is one and there is such a section.
fn keys_of<'a>(place: String, section: &str, written: &str, value: DeValue<'a>) -> Result<DeTable<'a>, ConfigError> {
    let names = || KEYS.iter().filter_map(|key| key.split_once('.'));
    let known = names().any(|(known, _)| known == section);
    match value {
        DeValue::Table(table) if known || !table.is_empty() => Ok(table),
        // `rounds` is a section and, more likely where a value stands, a key of another.
        _ if !known || names().any(|(_, key)| key == section) => Err(unknown(place, section)),
        _ => {
            let (key, got) = (section.to_owned(), written.to_owned());
            Err(ConfigError::Value {
                place,
                key,
                got,
                expected: format!("a section: [{section}] in a line of its own"),
            })
        }
    }
}

/// The environment variable of a key.
fn variable(key: &str) -> String {
    format!("TRIBUTARY_{}", key.replace('.', "_").to_uppercase())
}

fn unknown(place: String, key: &str) -> ConfigError {
    let distance = |known: &&&str| strsim::damerau_levenshtein(known, key);
    let near = |known: &&&str| distance(known) <= 1 + key.len() / 3;
    // A key in the wrong section is nearest to its own name in the right one.
    let name = |key: &str| key.rsplit('.').next().map(str::to_owned);
    let moved = KEYS.iter().find(|known| name(known) == name(key));
    let nearest = moved.or_else(|| KEYS.iter().min_by_key(distance).filter(near)).map(|known| (*known).to_owned());
    ConfigError::UnknownKey { place, key: key.to_owned(), nearest }
}

/// What a key's value may be.
trait Value: Sized {
    const EXPECTED: &'static str;
    fn read(value: &Typed) -> Option<Self>;
}

impl Value for String {
    const EXPECTED: &'static str = "a string";
    fn read(value: &Typed) -> Option<Self> {
        if let Typed::Text(text) = value { Some(text.clone()) } else { None }
    }
}

impl Value for bool {
    const EXPECTED: &'static str = "true or false";
    fn read(value: &Typed) -> Option<Self> {
        if let Typed::Truth(truth) = value { Some(*truth) } else { None }
    }
}

impl Value for u32 {
    const EXPECTED: &'static str = "a whole number from 0 to 4294967295";
    fn read(value: &Typed) -> Option<Self> {
        if let Typed::Whole(number) = value { Self::try_from(*number).ok() } else { None }
    }
}

impl Value for u64 {
    const EXPECTED: &'static str = "a whole number from 0 to 18446744073709551615";
    fn read(value: &Typed) -> Option<Self> {
        if let Typed::Whole(number) = value { Self::try_from(*number).ok() } else { None }
    }
}

impl Value for f64 {
    const EXPECTED: &'static str = "a number";
    fn read(value: &Typed) -> Option<Self> {
        match value {
            Typed::Real(number) => Some(*number),
            Typed::Whole(number) => u32::try_from(number.unsigned_abs()).ok().map(|size| {
                let size = Self::from(size);
                if *number < 0 { -size } else { size }
            }),
            _ => None,
        }
    }
}

impl Value for Vec<String> {
    const EXPECTED: &'static str = "a list of strings, such as [\"tailnum\"]";
    fn read(value: &Typed) -> Option<Self> {
        if let Typed::List(items) = value { items.iter().map(String::read).collect() } else { None }
    }
}

impl Value for Vec<u32> {
    const EXPECTED: &'static str = "a list of whole numbers, such as [64, 32]";
    fn read(value: &Typed) -> Option<Self> {
        if let Typed::List(items) = value { items.iter().map(u32::read).collect() } else { None }
    }
}

impl Value for BatchSize {
    const EXPECTED: &'static str = "\"full\" or a whole number of at least 1";
    fn read(value: &Typed) -> Option<Self> {
        match value {
            Typed::Text(text) => (text == "full").then_some(Self::Full),
            other => u32::read(other).map(Self::Rows),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse("run.toml", text, |_| None, Overrides::default())
    }

    fn refused(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn nothing_at_all_is_the_default_plan() {
        let config = parse("").unwrap();
        assert_eq!(config.plan, Plan::new(LearningPlan::default(), RoundsSpec::default()).unwrap());
        assert!(!config.strict_pq);
    }

    #[test]
    fn every_key_is_read() {
        let text = r#"
            [data]
            label = "late"
            task = "regression"
            drop = ["tailnum"]
            categorical = ["dest"]
            validation_fraction = 0
            [model]
            kind = "mlp"
            hidden = [8, 4]
            [train]
            mode = "gradient"
            rounds = 0x10
            local_epochs = 1
            batch_size = "full"
            optimizer = "sgd"
            learning_rate = 0.5
            momentum = 0.9
            seed = 18446744073709551615
            [strategy]
            kind = "fedavg"
            [rounds]
            min_workers = 3
            fraction = 1
            over_select = 0.3
            quorum = 0.5
            deadline_s = 1.5
            durability = "update"
            [limits]
            connections = 5000
            [tls]
            strict_pq = true
        "#;
        for key in KEYS {
            let name = key.rsplit('.').next().unwrap();
            assert!(text.contains(&format!("{name} = ")), "{key} is not in this test");
        }
        let Config { plan, connections_max, strict_pq } = parse(text).unwrap();
        assert!(strict_pq);
        assert_eq!(connections_max, 5_000);
        assert_eq!(plan.learning.data.label.as_deref(), Some("late"));
        assert_eq!(plan.learning.data.task, Some(LearningTask::Regression));
        assert_eq!(plan.learning.model, ModelSpec::Mlp { hidden: vec![8, 4] });
        assert_eq!((plan.learning.train.rounds, plan.learning.train.batch_size), (16, BatchSize::Full));
        assert_eq!(plan.learning.train.seed, u64::MAX);
        assert_eq!(plan.rounds.deadline, Some(Duration::from_millis(1500)));
        assert_eq!((plan.rounds.over_select, plan.rounds.durability), (0.3, Durability::Update));
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line_and_the_nearest_known() {
        assert_eq!(
            refused("[train]\nrounds = 3\nlearning_rat = 0.1\n"),
            "run.toml:3: unknown key train.learning_rat; did you mean train.learning_rate?"
        );
        assert_eq!(refused("[train]\nquorum = 1"), "run.toml:2: unknown key train.quorum; did you mean rounds.quorum?");
        assert_eq!(refused("batch_size = 3"), "run.toml:1: unknown key batch_size; did you mean train.batch_size?");
        assert_eq!(refused("rounds = 3"), "run.toml:1: unknown key rounds; did you mean train.rounds?");
        assert_eq!(refused("\n[zzzzzzzzzz]\n"), "run.toml:2: unknown key zzzzzzzzzz");
        assert_eq!(refused("[model]\nq7 = 1"), "run.toml:2: unknown key model.q7");
    }

    #[test]
    fn wrong_types_name_what_was_expected() {
        let got = refused("[train]\nrounds = \"many\"");
        assert_eq!(got, "run.toml:2: train.rounds is \"many\", expected a whole number from 0 to 4294967295");
        assert!(refused("[train]\nbatch_size = \"half\"").contains("expected \"full\" or a whole number"));
        assert!(refused("[data]\ndrop = \"tailnum\"").contains("expected a list of strings"));
        assert!(refused("[tls]\nstrict_pq = 1").contains("expected true or false"));
        assert!(refused("[train]\nmode = \"federate\"").contains("\"federated\" or \"gradient\" or \"central\""));
        assert!(refused("[train]\nrounds = -1").contains("is -1, expected a whole number from 0"));
    }

    #[test]
    fn values_out_of_range_name_their_place() {
        assert_eq!(
            refused("[rounds]\nquorum = 1.5"),
            "run.toml:2: rounds.quorum is 1.5, expected above 0 and at most 1"
        );
        assert_eq!(
            refused("[rounds]\nfraction = 0"),
            "run.toml:2: rounds.fraction is 0, expected above 0 and at most 1"
        );
        assert!(refused("[train]\nbatch_size = 0").starts_with("run.toml:2: train.batch_size is 0"));
        assert!(refused("[rounds]\ndeadline_s = -1").contains("rounds.deadline_s is -1"));
    }

    #[test]
    fn combinations_without_sense_are_refused() {
        assert!(refused("[model]\nkind = \"linear\"\nhidden = [3]").starts_with("run.toml:3: model.hidden is [3]"));
        assert!(
            refused("[train]\nmode = \"gradient\"\nlocal_epochs = 2").starts_with("run.toml:3: train.local_epochs")
        );
        assert!(refused("[data]\nlabel = \"y\"\ndrop = [\"y\"]").starts_with("run.toml:3: data.drop"));
        assert!(refused("[rounds]\ndurability = \"never\"").contains("expected \"round\" or \"update\""));
        assert!(
            refused("[rounds]\nover_select = 1.5").contains("rounds.over_select is 1.5, expected a number from 0 to 1")
        );
    }

    #[test]
    fn connections_are_as_many_as_was_said_and_no_fewer_than_workers_must_be_in() {
        let connections = |text: &str| parse(text).unwrap().connections_max;
        assert_eq!(connections(""), 4_096);
        assert_eq!(connections("[limits]\nconnections = 20000"), 20_000);
        assert_eq!(connections("[limits]\nconnections = 3\n[rounds]\nmin_workers = 3"), 3);
        assert_eq!(
            refused("[limits]\nconnections = 2\n[rounds]\nmin_workers = 3"),
            "run.toml:2: limits.connections is 2, expected 3 to 1000000, as many as workers that must be in or more"
        );
        assert!(refused("[limits]\nconnections = 0").contains("limits.connections is 0, expected 1 to 1000000"));
        assert!(refused("[limits]\nconnections = 1000001").contains("expected 1 to 1000000"));
        assert!(refused("[limits]\nconnection = 5").contains("did you mean limits.connections?"));
    }

    #[test]
    fn flags_win_over_the_environment_which_wins_over_the_file() {
        let file = "[train]\nrounds = 1\nseed = 1\n[data]\nlabel = \"a\"";
        let environment = |name: &str| match name {
            "TRIBUTARY_TRAIN_ROUNDS" => Some("2".to_owned()),
            "TRIBUTARY_TRAIN_SEED" => Some("2".to_owned()),
            "TRIBUTARY_DATA_LABEL" => Some("late".to_owned()),
            _ => None,
        };
        let flags = Overrides { rounds: Some(3), min_workers: Some(4) };
        let plan = Config::parse("run.toml", file, environment, flags).unwrap().plan;
        assert_eq!((plan.learning.train.rounds, plan.learning.train.seed), (3, 2));
        assert_eq!(plan.learning.data.label.as_deref(), Some("late"));
        assert_eq!(plan.rounds.min_workers, Some(4));
    }

    #[test]
    fn errors_name_the_variable_or_the_flag() {
        let environment = |name: &str| (name == "TRIBUTARY_TRAIN_SEED").then(|| "seven".to_owned());
        let error = Config::parse("", "", environment, Overrides::default()).unwrap_err().to_string();
        assert!(error.starts_with("TRIBUTARY_TRAIN_SEED: train.seed is seven, expected"), "{error}");
        let flags = Overrides { rounds: Some(0), min_workers: None };
        let error = Config::parse("", "", |_| None, flags).unwrap_err().to_string();
        assert!(error.starts_with("--rounds: train.rounds is 0, expected 1 to"), "{error}");
    }

    #[test]
    fn what_is_no_toml_is_refused_with_its_line() {
        assert!(refused("[train]\nrounds = = 3").starts_with("run.toml:2: not TOML: "));
    }
}
