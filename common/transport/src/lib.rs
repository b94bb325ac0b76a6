//! QUIC endpoints, TLS and frames: bytes, not their meaning.
