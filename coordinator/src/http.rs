//! What people and Prometheus read over HTTP: `/metrics`, `/healthz`, `/readyz`, `/status`. It only reads.
//!
//! The event loop leaves its status in a watch channel; a request never waits for it.

use std::future::Future;
use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::show::StatusPage;
use crate::telemetry::Telemetry;

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
    pub source: std::io::Error,
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
) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(status_json))
        .with_state(Source { telemetry, status });
    axum::serve(listener, routes).with_graceful_shutdown(end).await
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

/// Workers can come in.
async fn readyz(State(source): State<Source>) -> impl IntoResponse {
    if source.status.borrow().listening {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not listening\n")
    }
}

async fn status_json(State(source): State<Source>) -> impl IntoResponse {
    let page = source.status.borrow().to_json().to_string();
    ([(header::CONTENT_TYPE, "application/json")], page + "\n")
}
