//! Whole runs of the real binaries, as a user starts them.

use tributary_tests::{Home, data};

#[test]
fn two_lines_train_a_model_and_end() {
    let home = Home::new();
    let mut coordinator = home.coordinator(&["--min-workers", "2", "--rounds", "3", "--exit-when-done"]);
    coordinator.until("listening");
    home.write("a.csv", data::classes(1, 300));
    home.write("b.csv", data::classes(2, 300));
    let workers = [home.worker("a.csv", &[]), home.worker("b.csv", &[])];
    for round in 1..=3 {
        assert_eq!(coordinator.until("round")["round"], round);
    }
    let done = coordinator.until("done");
    assert!(done["eval"]["auc"].as_f64().unwrap() > 0.8, "{done}");
    assert_eq!(coordinator.end().code, Some(0));
    for worker in workers {
        let said = worker.end();
        assert_eq!(said.code, Some(0), "{}", said.stderr);
    }
}
