//! The real binaries, and other servers, as processes that do not outlive their test.
//!
//! Everything here panics when it cannot go on: it is for tests only.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Lines, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The longest wait for another process. A test that reaches it has failed.
const WAIT: Duration = Duration::from_secs(60);
/// How often is looked whether something outside this process has happened yet.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A process that is killed when this value goes. What it says on stderr is kept in a file.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, its stderr going to `log`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let stderr = File::create(log).unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let started = command.stdin(Stdio::null()).stderr(stderr).spawn();
        let child = started.unwrap_or_else(|error| panic!("{:?}: {error}", command.get_program()));
        Self { child, log: log.to_owned() }
    }

    /// The lines that it prints, if its stdout was piped; once.
    ///
    /// # Panics
    /// If it was not, or the second time.
    pub fn lines(&mut self) -> Lines<BufReader<ChildStdout>> {
        BufReader::new(self.child.stdout.take().expect("stdout was piped and is taken once")).lines()
    }

    /// What it said on stderr so far.
    #[must_use]
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_else(|error| format!("{}: {error}", self.log.display()))
    }

    /// Looks again and again until `happened` has something to show.
    ///
    /// # Panics
    /// After a minute, or as soon as the process has ended; with what it said.
    pub fn until<T>(&mut self, what: &str, mut happened: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + WAIT;
        loop {
            if let Some(value) = happened() {
                return value;
            }
            let ended = self.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "ended before {what}: {ended:?}\n{}", self.said());
            assert!(Instant::now() < deadline, "no {what} in {WAIT:?}\n{}", self.said());
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command on one of our binaries, with `home` as its state home and none of this user's settings.
///
/// # Panics
/// If the binary is not there.
#[must_use]
pub fn ours(binary: &str, home: &Path) -> Command {
    let own = std::env::current_exe().expect("a program knows its own path");
    let beside = own.parent().expect("a program lies in a folder");
    // Tests lie in deps/ below the binaries.
    let path = if beside.ends_with("deps") { beside.join("..") } else { beside.to_owned() }.join(binary);
    assert!(path.is_file(), "{} is not built: `make binaries` does it", path.display());
    let mut command = Command::new(path);
    let mine = |name: &OsStr| name.to_string_lossy().starts_with("TRIBUTARY_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| mine(name)) {
        command.env_remove(name);
    }
    command.env("HOME", home).env("XDG_STATE_HOME", home).env_remove("XDG_RUNTIME_DIR");
    command
}

/// Ports that no system gives to whoever asks for any.
const PORTS: std::ops::Range<u32> = 20_000..32_000;

/// A port on loopback that nobody has, for UDP and for TCP. This process is given it once, and others begin elsewhere: so it
/// stays free while a program that had it is started again.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(997);
    let free = || {
        let count = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(PORTS.start + count % (PORTS.end - PORTS.start)).ok()?;
        let has_both = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
            && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        has_both.then_some(port)
    };
    PORTS.into_iter().find_map(|_| free()).expect("loopback has a free port")
}

/// The body of `GET path`, if the server on loopback answers with 200.
#[must_use]
pub fn get(port: u16, path: &str) -> Option<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, WAIT).ok()?;
    stream.set_read_timeout(Some(WAIT)).ok()?;
    // HTTP/1.0: the body ends with the connection, and is not chunked.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.split(' ').nth(1).is_some_and(|status| status == "200").then(|| body.to_owned())
}
