//! A bad stretch of road for UDP: `impair --listen ADDRESS --to ADDRESS [--delay-ms N] [--reorder PERCENT]`.
//!
//! It forwards datagrams between whoever sends to `--listen` and the server at `--to`, as a NAT does: each client gets a
//! port of its own towards the server. Each datagram takes `--delay-ms`, each way, in order; of a hundred, `--reorder`
//! take [`DETOUR`] longer, so that others pass them. At SIGHUP each client gets another port, and what still comes to the
//! old one is lost: a NAT that forgets. Tests use it where the kernel lacks netem.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use protocol::draw::Draw;
use tokio::net::UdpSocket;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// How much longer a datagram takes that is passed by others.
const DETOUR: Duration = Duration::from_millis(25);
/// The longest datagram.
const DATAGRAM_BYTES_MAX: usize = 65_536;
const USAGE: &str = "usage: impair --listen ADDRESS --to ADDRESS [--delay-ms N] [--reorder PERCENT]";

/// What is done to datagrams.
#[derive(Clone, Copy, Debug)]
struct Weather {
    delay: Duration,
    reorder_percent: u64,
}

/// What was asked for.
#[derive(Debug)]
struct Request {
    listen: SocketAddr,
    to: SocketAddr,
    weather: Weather,
}

fn main() -> ExitCode {
    let Some(request) = parse(&std::env::args().skip(1).collect::<Vec<_>>()) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(forward(&request))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(words: &[String]) -> Option<Request> {
    let flags = ["--listen", "--to", "--delay-ms", "--reorder"];
    let mut given: HashMap<&str, &str> = HashMap::new();
    for pair in words.chunks(2) {
        let [flag, value] = pair else { return None };
        given.insert(flags.iter().find(|known| *known == flag)?, value);
    }
    let number = |flag| given.get(flag).map_or(Some(0), |value| value.parse::<u64>().ok());
    Some(Request {
        listen: given.get("--listen")?.parse().ok()?,
        to: given.get("--to")?.parse().ok()?,
        weather: Weather { delay: Duration::from_millis(number("--delay-ms")?), reorder_percent: number("--reorder")? },
    })
}

/// One client: its port towards the server, and who brings the answers back.
#[derive(Debug)]
struct Client {
    road: Road,
    answers: JoinHandle<()>,
}

/// Forwards until the process is killed.
async fn forward(request: &Request) -> std::io::Result<()> {
    let front = Arc::new(UdpSocket::bind(request.listen).await?);
    let mut clients: HashMap<SocketAddr, Client> = HashMap::new();
    let mut hangup = signal(SignalKind::hangup())?;
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        tokio::select! {
            // A port of ours that is not open yet or any more at the other end is no reason to stop.
            Ok((length, from)) = front.recv_from(&mut datagram) => {
                let client = match clients.entry(from) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) => new.insert(Client::new(&front, from, request).await?),
                };
                client.road.take(&datagram[..length]);
            }
            _ = hangup.recv() => {
                for (from, client) in &mut clients {
                    let new = Client::new(&front, *from, request).await?;
                    std::mem::replace(client, new).answers.abort();
                }
            }
        }
    }
}

impl Client {
    async fn new(front: &Arc<UdpSocket>, from: SocketAddr, request: &Request) -> std::io::Result<Self> {
        let back = Arc::new(UdpSocket::bind((request.listen.ip(), 0)).await?);
        back.connect(request.to).await?;
        let road = Road::new(Arc::clone(&back), request.to, request.weather, "to the server");
        let home = Road::new(Arc::clone(front), from, request.weather, "to the client");
        let answers = tokio::spawn(async move {
            let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
            loop {
                if let Ok(length) = back.recv(&mut datagram).await {
                    home.take(&datagram[..length]);
                }
            }
        });
        Ok(Self { road, answers })
    }
}

/// One direction: datagrams arrive after their delay, those without a detour in order.
#[derive(Debug)]
struct Road {
    straight: UnboundedSender<(Instant, Vec<u8>)>,
    detour: UnboundedSender<(Instant, Vec<u8>)>,
    draw: std::sync::Mutex<Draw>,
    weather: Weather,
}

impl Road {
    fn new(socket: Arc<UdpSocket>, to: SocketAddr, weather: Weather, name: &str) -> Self {
        let lane = |socket: Arc<UdpSocket>| {
            let (send, mut receive) = unbounded_channel::<(Instant, Vec<u8>)>();
            tokio::spawn(async move {
                while let Some((due, datagram)) = receive.recv().await {
                    sleep_until(due).await;
                    // Lost is lost: this is UDP.
                    let _ = match socket.peer_addr() {
                        Ok(_) => socket.send(&datagram).await,
                        Err(_) => socket.send_to(&datagram, to).await,
                    };
                }
            });
            send
        };
        let draw = std::sync::Mutex::new(Draw::new(to.port().into(), "impair", 0, name));
        Self { straight: lane(Arc::clone(&socket)), detour: lane(socket), draw, weather }
    }

    fn take(&self, datagram: &[u8]) {
        let due = Instant::now() + self.weather.delay;
        let passed = self.draw.lock().is_ok_and(|mut draw| draw.below(100) < self.weather.reorder_percent);
        let (lane, due) = if passed { (&self.detour, due + DETOUR) } else { (&self.straight, due) };
        // A lane ends with this value only.
        let _ = lane.send((due, datagram.to_vec()));
    }
}
