//! Twenty kills of `make soak`'s two hundred.

use tributary_tests::soak::soak;

#[test]
fn killed_twenty_times_at_random_moments_a_fleet_ends_with_the_same_model_and_every_receipt() {
    let seen = soak(20, 20);
    eprintln!("{seen}");
    assert!(seen.coordinator_kills > 0 && seen.worker_kills > 0 && !seen.recoveries.is_empty(), "{seen:?}");
}
