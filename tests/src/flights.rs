//! Real data: the demo's three airports, cut to what keeps a test short, and what an undisturbed fleet makes of them.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::collections::{BTreeMap, BTreeSet};

use protocol::messages::Receipt;
use serde_json::Value;
use worker::receipts::verify_log;

use crate::fleet::{Fleet, Undisturbed, ended_well};
use crate::home::Home;
use crate::repository;

/// The airports, one worker each.
pub const AIRPORTS: [&str; 3] = ["ewr", "jfk", "lga"];

/// The demo's config with so many rounds, and with a hidden layer of so many units if there are any. All workers are in
/// every round, and all of them are needed: so its models depend on the seed and the data alone.
#[must_use]
pub fn config(rounds: u32, hidden: u32) -> String {
    let text = std::fs::read_to_string(repository().join("deploy/demo/flights.toml")).unwrap();
    let replaced = |text: String, from: &str, to: &str| {
        assert!(text.contains(from), "{from:?} is in the demo's config");
        text.replacen(from, to, 1)
    };
    let text = replaced(text, "rounds = 30", &format!("rounds = {rounds}"));
    match hidden {
        0 => text,
        _ => replaced(text, "kind = \"linear\"", &format!("kind = \"mlp\"\nhidden = [{hidden}]")),
    }
}

/// The first rows of each airport.
#[must_use]
pub fn shards(rows: usize) -> [(&'static str, String); 3] {
    AIRPORTS.map(|airport| {
        let text = std::fs::read_to_string(repository().join(format!("deploy/demo/{airport}.csv"))).unwrap();
        let lines: Vec<_> = text.lines().take(rows + 1).collect();
        (airport, lines.join("\n") + "\n")
    })
}

/// What a fleet that nobody disturbs makes of this config and these rows.
#[must_use]
pub fn undisturbed(config: &str, rows: usize) -> Undisturbed {
    Fleet::new(config, shards(rows)).train(&[])
}

impl Undisturbed {
    /// The final model.
    #[must_use]
    pub fn model(&self) -> &str {
        self.done["model_hash"].as_str().unwrap()
    }

    /// Asserts that each airport's worker, whatever was done to it, holds exactly one receipt for each round, that all
    /// verify offline, that each is in the coordinator's record, and that each names the model that this undisturbed fleet
    /// had after that round.
    pub fn assert_every_update_is_receipted(&self, home: &Home) {
        let committed = committed(home);
        for worker in AIRPORTS {
            let receipts = receipts(home, worker);
            let rounds: Vec<_> = receipts.iter().map(|receipt| u64::from(receipt.round)).collect();
            let expected: Vec<_> = self.rounds.iter().map(|line| line["round"].as_u64().unwrap()).collect();
            assert_eq!(rounds, expected, "one receipt for each round of {worker}");
            for (receipt, line) in receipts.iter().zip(&self.rounds) {
                let entry = (receipt.task.to_string(), worker.to_owned(), receipt.hash.to_string());
                assert_eq!(committed.get(&entry), Some(&receipt.round), "{entry:?} is in the coordinator's record");
                assert_eq!(receipt.model_hash.to_string(), line["model_hash"], "{worker} in round {}", receipt.round);
            }
        }
    }
}

/// What the coordinator's journal says is in the models: task, worker and payload, and the round. Every hash is checked.
#[must_use]
pub fn committed(home: &Home) -> BTreeMap<(String, String, String), u32> {
    let said = ended_well(home.start("coordinator", &["audit", "--verify", "--json"]));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut entries = BTreeMap::new();
    for line in said.lines("committed") {
        let round = u32::try_from(line["round"].as_u64().unwrap()).unwrap();
        for update in line["updates"].as_array().unwrap() {
            let entry = (text(&update["task"]), text(&update["worker"]), text(&update["payload"]));
            let before = entries.insert(entry, round);
            assert!(before.is_none_or(|before| before == round), "counted in two rounds: {update}");
        }
    }
    entries
}

/// The receipts that a worker holds of the only run it was in, by round. A receipt that came twice, because a crash
/// parted it from its acknowledgement, is one.
#[must_use]
pub fn receipts(home: &Home, worker: &str) -> Vec<Receipt> {
    let folder = home.path(format!("tributary/worker/{worker}/receipts"));
    let logs: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [log] = logs.as_slice() else { panic!("{worker} was in one run: {logs:?}") };
    ended_well(home.start("worker", &["verify-receipts", &log.display().to_string()]));
    let (mut seen, mut receipts) = (BTreeSet::new(), Vec::new());
    let keep = |receipt: &Receipt| {
        if seen.insert(protocol::messages::encode(receipt)) {
            receipts.push(*receipt);
        }
    };
    verify_log(log, None, keep).unwrap_or_else(|error| panic!("{error}"));
    receipts.sort_by_key(|receipt| receipt.round);
    receipts
}
