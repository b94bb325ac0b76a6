//! The files in `deploy/` are true: what they name exists, and what reads them accepts them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use coordinator::config::{Config, KEYS, Overrides};
use serde_json::Value;
use tributary_tests::{repository, tool};

/// The demo's data may not weigh more, in bytes.
const DEMO_BYTES_MAX: u64 = 2_000_000;

pub(crate) fn file(name: &str) -> PathBuf {
    repository().join("deploy").join(name)
}

pub(crate) fn text(name: &str) -> String {
    std::fs::read_to_string(file(name)).unwrap()
}

/// The dashboard's panels, rows left out.
pub(crate) fn panels() -> Vec<Value> {
    let dashboard: Value = serde_json::from_str(&text("grafana/dashboards/tributary.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    panels.filter(|panel| panel["type"] != "row").cloned().collect()
}

/// Every query of the dashboard, by the title of its panel.
pub(crate) fn queries() -> Vec<(String, String)> {
    let queries = panels().into_iter().flat_map(|panel| {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().unwrap().clone();
        targets.into_iter().map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_owned()))
    });
    queries.collect()
}

fn held_out_rows() -> Vec<String> {
    text("demo/heldout.csv").lines().skip(1).map(str::to_owned).collect()
}

fn config(text: &str) -> Config {
    Config::parse("deploy", text, |_| None, Overrides::default()).unwrap()
}

#[test]
fn the_sample_config_is_the_default_one() {
    assert_eq!(config(&text("coordinator.toml")), config(""));
}

#[test]
fn the_sample_config_explains_every_key() {
    // A key without a default stands behind one #.
    let all = text("coordinator.toml").lines().fold(String::new(), |all, line| {
        let key = line.strip_prefix('#').filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
        all + key.unwrap_or(line) + "\n"
    });
    config(&all);
    let table: toml::Table = all.parse().unwrap();
    let keys = table
        .iter()
        .flat_map(|(section, keys)| keys.as_table().unwrap().keys().map(move |key| format!("{section}.{key}")));
    assert_eq!(keys.collect::<BTreeSet<_>>(), KEYS.iter().map(|key| (*key).to_owned()).collect());
}

#[test]
fn the_demo_trains_on_its_columns() {
    let plan = config(&text("demo/flights.toml")).plan;
    let table = text("demo/ewr.csv");
    let columns: Vec<_> = table.lines().next().unwrap().split(',').collect();
    let named = plan.learning.data.categorical.iter().chain(&plan.learning.data.label);
    for name in named {
        assert!(columns.contains(&name.as_str()), "{name}");
    }
    assert_eq!(plan.rounds.min_workers, Some(3));
}

#[test]
fn the_demo_fits_in_the_tree_and_its_files_agree() {
    let names = ["ewr", "jfk", "lga", "heldout"].map(|stem| format!("demo/{stem}.csv"));
    let bytes: u64 = names.iter().map(|name| file(name).metadata().unwrap().len()).sum();
    assert!(bytes <= DEMO_BYTES_MAX, "{bytes} bytes");
    let headers: BTreeSet<_> = names.iter().map(|name| text(name).lines().next().unwrap().to_owned()).collect();
    assert_eq!(headers.into_iter().collect::<Vec<_>>(), ["month,weekday,hour,carrier,dest,distance,dep_delay,late"]);
    for name in &names {
        let late = text(name).lines().skip(1).filter(|row| row.ends_with(",1")).count();
        let rows = text(name).lines().count() - 1;
        assert!(late * 5 > rows && late * 3 < rows, "{name}: {late} of {rows} flights are late");
    }
    assert_eq!(held_out_rows().len(), 24_000);
}

#[test]
fn every_panel_has_an_id_of_its_own_and_the_provisioned_source() {
    let panels = panels();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let source = text("grafana/provisioning/datasources/prometheus.yaml");
    for panel in &panels {
        for target in panel["targets"].as_array().unwrap() {
            let uid = target["datasource"]["uid"].as_str().unwrap();
            assert!(source.contains(&format!("uid: {uid}\n")), "{}: {uid}", panel["title"]);
        }
    }
}

#[test]
fn what_compose_mounts_is_there() {
    let compose = text("compose.yaml");
    let mounts = compose.lines().filter_map(|line| line.trim().strip_prefix("- ./")?.split(':').next());
    let mounts: Vec<_> = mounts.collect();
    assert!(mounts.len() >= 7, "{mounts:?}");
    for mount in mounts {
        assert!(file(mount).exists(), "compose.yaml mounts {mount}");
    }
}

#[test]
fn prometheus_accepts_its_config() {
    let Some(promtool) = tool("TRIBUTARY_PROMTOOL", "deploy/prometheus.yml") else { return };
    let output = Command::new(promtool).args(["check", "config"]).arg(file("prometheus.yml")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
