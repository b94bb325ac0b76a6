//! A network of the kernel's own for one fleet: a namespace for the coordinator, one for each worker, a cable to each.
//!
//! The coordinator listens on [`SERVICE`], an address that belongs to no cable. Workers reach it over their own cable,
//! which can be cut, narrowed or made to lose datagrams, and whose worker's end can get another address. What the kernel
//! may lack (delay, reordering, a NAT that forgets) comes from the program `impair`, which stands on [`IMPAIRED`] in the
//! coordinator's namespace. It takes root, iproute2 and nftables; whoever lacks them is told by [`Network::lay`].
//!
//! Everything after that panics when it cannot go on: it is for tests only.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the coordinator listens.
pub const SERVICE: &str = "10.99.0.1:4433";
/// Where `impair` listens, for the workers that are to meet it.
pub const IMPAIRED: &str = "10.99.0.2:4433";

/// The namespaces of one fleet; gone with the value.
#[derive(Debug)]
pub struct Network {
    name: String,
    workers: usize,
}

impl Network {
    /// Lays the cables to so many workers.
    ///
    /// # Errors
    /// What is missing, if this machine or its kernel does not let us.
    pub fn lay(workers: usize) -> Result<Self, String> {
        static LAID: AtomicU32 = AtomicU32::new(0);
        remove_leftovers();
        let number = LAID.fetch_add(1, Ordering::Relaxed);
        let network = Self { name: format!("tributary-{}-{number}", std::process::id()), workers };
        network.build()?;
        Ok(network)
    }

    fn build(&self) -> Result<(), String> {
        let hub = self.hub();
        run("ip", &["netns", "add", &hub], "")?;
        run(
            "ip",
            &["-n", &hub, "-batch", "-"],
            "link set lo up\naddr add 10.99.0.1/32 dev lo\naddr add 10.99.0.2/32 dev lo\n",
        )?;
        (0..self.workers).try_for_each(|worker| self.connect(worker))?;
        // Whether the kernel filters and narrows is found out now, not in the middle of a test.
        self.try_filter(0, "")?;
        run(
            "tc",
            &["-n", &hub, "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1gbit", "burst", "1mb", "latency", "1s"],
            "",
        )?;
        run("tc", &["-n", &hub, "qdisc", "del", "dev", "lo", "root"], "")
    }

    fn connect(&self, worker: usize) -> Result<(), String> {
        let (hub, end) = (self.hub(), self.end(worker));
        run("ip", &["netns", "add", &end], "")?;
        let cable = cable(worker);
        run("ip", &["-n", &hub, "link", "add", &cable, "type", "veth", "peer", "name", "cable", "netns", &end], "")?;
        let near = format!("addr add 10.7.{worker}.1/24 dev {cable}\nlink set {cable} up\n");
        run("ip", &["-n", &hub, "-batch", "-"], &near)?;
        let far = format!("link set lo up\nlink set cable up\n{}", addressed(worker, 2));
        run("ip", &["-n", &end, "-batch", "-"], &far)
    }

    /// `command` as it runs where the coordinator is.
    #[must_use]
    pub fn at_coordinator(&self, command: &Command) -> Command {
        inside(&self.hub(), command)
    }

    /// `command` as it runs where this worker is.
    #[must_use]
    pub fn at_worker(&self, worker: usize, command: &Command) -> Command {
        inside(&self.end(worker), command)
    }

    /// Loses so many datagrams of a hundred on a worker's cable, each way, from now on.
    pub fn lose(&self, worker: usize, percent: u32) {
        self.try_filter(worker, &format!("numgen random mod 100 < {percent} drop")).unwrap();
    }

    /// Loses all on a worker's cable, each way, from now on.
    pub fn cut(&self, worker: usize) {
        self.try_filter(worker, "drop").unwrap();
    }

    /// Loses nothing on a worker's cable from now on.
    pub fn mend(&self, worker: usize) {
        self.try_filter(worker, "").unwrap();
    }

    /// Lets so many kilobits a second through a worker's cable, each way. The queue before it holds 400 ms.
    pub fn narrow(&self, worker: usize, kilobits: u32) {
        let rate = format!("{kilobits}kbit");
        for (namespace, device) in [(self.hub(), cable(worker)), (self.end(worker), "cable".to_owned())] {
            let bucket = ["root", "tbf", "rate", &rate, "burst", "16kb", "latency", "400ms"];
            let words = ["-n", &namespace, "qdisc", "add", "dev", &device].into_iter().chain(bucket);
            run("tc", &words.collect::<Vec<_>>(), "").unwrap();
        }
    }

    /// Takes a worker's address away and gives it another; `host` is the last number of the new one.
    pub fn readdress(&self, worker: usize, host: u8) {
        assert!(host > 1, "1 is the coordinator's end");
        let change = format!("addr flush dev cable\n{}", addressed(worker, host));
        run("ip", &["-n", &self.end(worker), "-batch", "-"], &change).unwrap();
    }

    fn try_filter(&self, worker: usize, rule: &str) -> Result<(), String> {
        let table = format!(
            "table inet weather {{}}\ndelete table inet weather\ntable inet weather {{\n\
             chain in {{ type filter hook input priority 0; {rule}\n }}\n\
             chain out {{ type filter hook output priority 0; {rule}\n }}\n}}\n"
        );
        run("ip", &["netns", "exec", &self.end(worker), "nft", "-f", "-"], &table)
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }

    fn end(&self, worker: usize) -> String {
        format!("{}-{worker}", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in (0..self.workers).map(|worker| self.end(worker)).chain([self.hub()]) {
            // One that was never made is gone already.
            let _ = run("ip", &["netns", "del", &name], "");
        }
    }
}

/// The coordinator's end of a worker's cable.
fn cable(worker: usize) -> String {
    format!("cable{worker}")
}

/// What gives the worker's end of a cable its address, and the way to the coordinator.
fn addressed(worker: usize, host: u8) -> String {
    format!("addr add 10.7.{worker}.{host}/24 dev cable\nroute add default via 10.7.{worker}.1\n")
}

/// `command` in a namespace, with its environment and folder. `ip` becomes the command: there is no process between.
fn inside(namespace: &str, command: &Command) -> Command {
    let mut wrapped = Command::new("ip");
    wrapped.args(["netns", "exec", namespace]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        wrapped.current_dir(folder);
    }
    wrapped
}

/// Runs a tool to its end.
fn run(program: &str, words: &[&str], input: &str) -> Result<(), String> {
    let told = |error| format!("{program}: {error}");
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(told)?;
    child.stdin.take().unwrap().write_all(input.as_bytes()).map_err(told)?;
    let output = child.wait_with_output().map_err(told)?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

/// Removes the namespaces of tests that were killed: their process is gone, and named namespaces outlive it.
fn remove_leftovers() {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let owner = name.strip_prefix("tributary-").and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = run("ip", &["netns", "del", &name], "");
        }
    }
}
