//! A fleet in one home: a config, a data file for each worker, and the processes that a user would start on them.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::path::PathBuf;

use serde_json::Value;

use crate::home::{Home, Running, Said};

/// A config and some data files; nothing runs until it is started.
#[derive(Debug)]
pub struct Fleet {
    home: Home,
    names: Vec<&'static str>,
}

/// What a fleet said that was left alone until the end of its run.
#[derive(Debug)]
pub struct Undisturbed {
    /// The coordinator's `round` lines.
    pub rounds: Vec<Value>,
    /// Its `done` line.
    pub done: Value,
}

impl Fleet {
    /// A home with `config` in it, and for each worker a CSV file `<name>.csv`.
    #[must_use]
    pub fn new<const N: usize>(config: &str, shards: [(&'static str, String); N]) -> Self {
        let home = Home::new();
        home.write("run.toml", config);
        for (name, text) in &shards {
            home.write(&format!("{name}.csv"), text);
        }
        Self { home, names: shards.map(|(name, _)| name).into() }
    }

    /// Its home.
    #[must_use]
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The workers' names.
    #[must_use]
    pub fn names(&self) -> &[&'static str] {
        &self.names
    }

    /// Starts the coordinator with the config; its rounds begin when all workers are in.
    pub fn coordinator(&self, args: &[&str]) -> Running {
        let (config, min) = (self.home.path("run.toml").display().to_string(), self.names.len().to_string());
        let mut all = vec!["--config", &config, "--min-workers", &min];
        all.extend(args);
        self.home.coordinator(&all)
    }

    /// Starts one worker.
    pub fn worker(&self, name: &str, args: &[&str]) -> Running {
        self.home.worker(&format!("{name}.csv"), args)
    }

    /// Starts all workers.
    pub fn workers(&self, args: &[&str]) -> Vec<Running> {
        self.names.iter().map(|name| self.worker(name, args)).collect()
    }

    /// Runs to the end; everybody ends with 0.
    pub fn train(&self, worker_args: &[&str]) -> Undisturbed {
        let coordinator = self.coordinator(&["--exit-when-done"]);
        let workers = self.workers(worker_args);
        let said = ended_well(coordinator);
        workers.into_iter().for_each(|worker| drop(ended_well(worker)));
        let done = said.lines("done").pop().unwrap();
        Undisturbed { rounds: said.lines("round"), done }
    }

    /// The directories of all runs.
    #[must_use]
    pub fn runs(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.home.state().join("runs")).unwrap();
        let mut runs: Vec<_> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
        runs.sort();
        runs
    }

    /// The model files of the only run, the oldest first.
    #[must_use]
    pub fn models(&self) -> Vec<PathBuf> {
        let runs = self.runs();
        assert_eq!(runs.len(), 1, "{runs:?}");
        let entries = std::fs::read_dir(&runs[0]).unwrap().map(|entry| entry.unwrap().path());
        // One that is still being written has an ending.
        let is_model = |path: &PathBuf| {
            path.file_name().unwrap().to_string_lossy().starts_with("model-") && path.extension().is_none()
        };
        let mut models: Vec<_> = entries.filter(is_model).collect();
        models.sort();
        models
    }
}

/// Waits for the end of a process, which must be 0.
pub fn ended_well(process: Running) -> Said {
    let said = process.end();
    assert_eq!(said.code, Some(0), "{}\n{}", said.stdout, said.stderr);
    said
}
