//! A real Prometheus scrapes a real coordinator while it trains, and the dashboard shows it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::{Command, Stdio};

use serde_json::Value;
use tributary_tests::process::{Process, free_port, get, ours};
use tributary_tests::tool;

use crate::deploy;

/// Queries whose answer, in the middle of a run, is a number above zero. The others may rightly show none.
const BUSY: [&str; 10] = [
    "Rounds committed",
    "AUC",
    "Accuracy",
    "Parameters",
    "Loss",
    "Round duration",
    "Update norm",
    "Journal sync",
    "QUIC datagrams",
    "Payload bytes",
];

#[test]
fn every_metric_and_query_of_the_dashboard_has_data_during_a_run() {
    let Some(prometheus) = tool("TRIBUTARY_PROMETHEUS", "the dashboard against a real Prometheus") else { return };
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (http, web) = (free_port(), free_port());

    let mut coordinator = Process::start(
        ours("coordinator", home)
            .arg("--config")
            .arg(deploy::file("demo/flights.toml"))
            .args(["--listen", &format!("127.0.0.1:{}", free_port())])
            .args(["--http", &format!("127.0.0.1:{http}")])
            .args(["--rounds", "10000", "--min-workers", "2", "--json"])
            .stdout(Stdio::piped()),
        &home.join("coordinator.log"),
    );
    let lines = coordinator.lines();
    let _workers = ["ewr", "jfk"].map(|airport| {
        let data = deploy::file(&format!("demo/{airport}.csv"));
        let log = home.join(format!("{airport}.log"));
        Process::start(ours("worker", home).arg("--data").arg(data).stdout(Stdio::null()), &log)
    });
    // It blocks if nobody reads what it prints.
    let reader = std::thread::spawn(move || lines.map_while(Result::ok).count());

    let config = deploy::text("prometheus.yml")
        .replace("coordinator:9464", &format!("127.0.0.1:{http}"))
        .replace("scrape_interval: 5s", "scrape_interval: 1s");
    std::fs::write(home.join("prometheus.yml"), config).unwrap();
    let mut server = Process::start(
        Command::new(prometheus)
            .arg(format!("--config.file={}", home.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", home.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{web}"))
            .stdout(Stdio::null()),
        &home.join("prometheus.log"),
    );

    server.until("readiness", || get(web, "/-/ready"));
    for (title, query) in deploy::queries() {
        let busy = BUSY.contains(&title.as_str());
        let what = format!("answer to {query} ({title})");
        coordinator.until(&what, || ask(web, &query).filter(|values| !busy || values.iter().any(|value| *value > 0.0)));
    }
    for metric in metrics() {
        coordinator.until(&format!("metric {metric}"), || ask(web, &metric));
    }
    drop(coordinator);
    reader.join().unwrap();
}

#[test]
fn promtool_has_nothing_to_say_about_the_metrics() {
    let Some(promtool) = tool("TRIBUTARY_PROMTOOL", "promtool check metrics") else { return };
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let http = free_port();
    let mut coordinator = Process::start(
        ours("coordinator", home)
            .args(["--listen", &format!("127.0.0.1:{}", free_port())])
            .args(["--http", &format!("127.0.0.1:{http}")])
            .stdout(Stdio::null()),
        &home.join("coordinator.log"),
    );
    let metrics = coordinator.until("/metrics", || get(http, "/metrics"));
    std::fs::write(home.join("metrics"), &metrics).unwrap();
    let output = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(std::fs::File::open(home.join("metrics")).unwrap())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));

    let families: BTreeMap<_, _> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let family = |series: &str| {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|part| series.strip_suffix(part));
        families.contains_key(series) || base.is_some_and(|base| families.get(base) == Some(&"histogram"))
    };
    for series in self::metrics() {
        assert!(family(&series), "the dashboard names {series}, which is not there from the start");
    }
}

/// The values of an instant query's result; none if it has no result yet.
fn ask(port: u16, query: &str) -> Option<Vec<f64>> {
    let answer: Value = serde_json::from_str(&get(port, &format!("/api/v1/query?query={}", escape(query)))?).ok()?;
    let values = answer["data"]["result"].as_array()?.iter();
    let values: Vec<f64> = values.filter_map(|series| series["value"][1].as_str()?.parse().ok()).collect();
    (!values.is_empty()).then_some(values)
}

fn escape(query: &str) -> String {
    query.bytes().fold(String::new(), |mut escaped, byte| {
        write!(escaped, "%{byte:02X}").unwrap();
        escaped
    })
}

/// Every series that the dashboard names.
fn metrics() -> BTreeSet<String> {
    let named = |query: String| {
        let words = query.split(|c: char| c != '_' && !c.is_ascii_alphanumeric()).map(str::to_owned);
        words.filter(|word| word.starts_with("tributary_")).collect::<Vec<_>>()
    };
    deploy::queries().into_iter().flat_map(|(_, query)| named(query)).collect()
}
