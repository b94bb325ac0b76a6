//! The PKI of a fleet: certificate authority, worker and coordinator certificates, keys in PKCS#8.
