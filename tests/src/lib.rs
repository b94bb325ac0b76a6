//! Fleets over loopback, security, deploy files, documents.
