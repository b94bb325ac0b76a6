//! What durability costs: see `durability`.

fn main() {
    tributary_bench::durability::main();
}
