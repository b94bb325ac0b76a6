//! What people and Prometheus read over HTTP: `/metrics`, `/healthz`, `/readyz`, `/status`. It only reads.
//!
//! The event loop leaves its status in a watch channel; a request never waits for it. Connections are bounded in number
//! and in life: whoever opens many and says nothing must not take the files that the run needs.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Sleep, sleep};

use crate::show::StatusPage;
use crate::telemetry::Telemetry;

/// Connections that are served at once; more wait in the operating system's queue.
const CONNECTIONS_MAX: usize = 64;

/// How long a connection may live. Prometheus opens another one.
const LIFE_MAX: Duration = Duration::from_secs(300);

/// What the routes read from.
#[derive(Clone, Debug)]
struct Source {
    telemetry: Telemetry,
    status: watch::Receiver<StatusPage>,
}

/// The address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("--http {address}: cannot listen there; give another address with --http")]
pub struct BindError {
    /// The address.
    pub address: SocketAddr,
    /// The operating system's answer.
    pub source: io::Error,
}

/// Takes the address.
///
/// # Errors
/// If it cannot be had.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Serves until `end`.
///
/// # Errors
/// If the listener breaks.
pub async fn serve(
    listener: TcpListener,
    telemetry: Telemetry,
    status: watch::Receiver<StatusPage>,
    end: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(status_json))
        .with_state(Source { telemetry, status });
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    axum::serve(Bounded { listener, permits }, routes).with_graceful_shutdown(end).await
}

/// A listener that has so many connections at most.
struct Bounded {
    listener: TcpListener,
    permits: Arc<Semaphore>,
}

impl Listener for Bounded {
    type Io = Visitor;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Visitor, SocketAddr) {
        let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return std::future::pending().await };
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        (Visitor { stream, life: Box::pin(sleep(LIFE_MAX)), _permit: permit }, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection whose time is limited.
struct Visitor {
    stream: TcpStream,
    life: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Visitor {
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        self.life.as_mut().poll(context).is_ready()
    }
}

impl AsyncRead for Visitor {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Visitor {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

async fn metrics(State(source): State<Source>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], source.telemetry.render())
}

/// The process answers: the event loop lives as long as its end of the channel does.
async fn healthz(State(source): State<Source>) -> impl IntoResponse {
    if source.status.has_changed().is_ok() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "ending\n")
    }
}

/// Workers can come in, and what they send can be kept.
async fn readyz(State(source): State<Source>) -> impl IntoResponse {
    let page = source.status.borrow();
    match (page.listening, page.disk_full) {
        (true, false) => (StatusCode::OK, "ready\n"),
        (true, true) => {
            (StatusCode::SERVICE_UNAVAILABLE, "the disk is full: make room, and the run goes on by itself\n")
        }
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "not listening\n"),
    }
}

async fn status_json(State(source): State<Source>) -> impl IntoResponse {
    let page = source.status.borrow().to_json().to_string();
    ([(header::CONTENT_TYPE, "application/json")], page + "\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn while_the_disk_is_full_it_lives_and_is_not_ready_and_says_why() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (page, status) = watch::channel(StatusPage { listening: true, ..StatusPage::default() });
        let server = tokio::spawn(serve(listener, Telemetry::new(), status, std::future::pending()));
        assert!(ask(address, "/readyz").await.ends_with("ready\n"));
        page.send_modify(|page| page.disk_full = true);
        let answer = ask(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.0 503") && answer.contains("the disk is full"), "{answer}");
        assert!(ask(address, "/healthz").await.starts_with("HTTP/1.0 200"));
        page.send_modify(|page| page.disk_full = false);
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.0 200"));
        server.abort();
    }

    #[tokio::test]
    async fn who_opens_many_connections_and_says_nothing_takes_a_bounded_number_of_files() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_page, status) = watch::channel(StatusPage::default());
        let server = tokio::spawn(serve(listener, Telemetry::new(), status, std::future::pending()));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut next = TcpStream::connect(address).await.unwrap();
        next.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        assert!(timeout(Duration::from_millis(100), next.read_to_string(&mut answer)).await.is_err(), "{answer}");
        silent.pop();
        next.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        server.abort();
    }
}
