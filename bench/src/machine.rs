//! What the machine is: it goes with the figures, and some lines ask whether they fit.

use serde_json::{Value, json};

/// Kernel, cores, processor and memory.
pub(crate) fn describe() -> Value {
    let kernel = read("/proc/sys/kernel/osrelease");
    json!({ "kernel": kernel, "cores": cores(), "cpu": cpu(), "memory_gb": memory("MemTotal") / 1_000_000_000,
        "load": load() })
}

/// The same for a person.
pub(crate) fn sentence() -> String {
    let (cores, gb) = (cores(), memory("MemTotal") / 1_000_000_000);
    format!("{cores} cores ({}), {gb} GB, Linux {}, load average {}", cpu(), read("/proc/sys/kernel/osrelease"), load())
}

/// Cores that this process may run on.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory that are there for the taking; as many as can be counted where nobody says.
pub(crate) fn memory_available() -> u64 {
    match memory("MemAvailable") {
        0 => u64::MAX,
        bytes => bytes,
    }
}

/// A line of `/proc/meminfo`, in bytes; 0 where there is none.
fn memory(name: &str) -> u64 {
    let info = read("/proc/meminfo");
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

fn load() -> String {
    read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned()
}

fn cpu() -> String {
    let info = read("/proc/cpuinfo");
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": "))
        .map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.to_owned())
}

/// Empty where the system has no such file.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}
