//! What a process costs, as `/proc` tells it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// The kernel tells times to user space in hundredths of a second, on every architecture.
const TICK: Duration = Duration::from_millis(10);

/// Bytes that it has in memory.
pub(crate) fn resident(process: u32) -> Result<u64> {
    status(process, "VmRSS:")
}

/// The most that it ever had in memory, or since [`forget_peak`].
pub(crate) fn peak(process: u32) -> Result<u64> {
    status(process, "VmHWM:")
}

/// Lets the peak of this process begin anew.
pub(crate) fn forget_peak() -> Result<()> {
    std::fs::write("/proc/self/clear_refs", "5").context("/proc/self/clear_refs")
}

/// Processor time of all its threads, those that have ended included.
pub(crate) fn cpu(process: u32) -> Result<Duration> {
    Ok(Stat::read(Path::new(&format!("/proc/{process}")))?.cpu)
}

/// Processor time of this process's threads of one name.
pub(crate) fn threads_cpu(name: &str) -> Result<Duration> {
    let mut cpu = Duration::ZERO;
    for thread in std::fs::read_dir("/proc/self/task").context("/proc/self/task")? {
        let stat = Stat::read(&thread?.path())?;
        if stat.name == name {
            cpu += stat.cpu;
        }
    }
    Ok(cpu)
}

/// What is said of a process or of a thread.
struct Stat {
    name: String,
    cpu: Duration,
}

impl Stat {
    fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("stat");
        let stat = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // The name stands in parentheses, and may hold anything.
        let (name, fields) = stat.rsplit_once(") ").with_context(|| path.display().to_string())?;
        let name = name.split_once('(').map_or("", |(_, name)| name).to_owned();
        let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u32>).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { name, cpu: ticks.iter().map(|ticks| TICK * *ticks).sum() })
    }
}

fn status(process: u32, name: &str) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let status = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let line =
        status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in {path}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
