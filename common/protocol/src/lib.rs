//! The sans-IO heart of Tributary: messages, the two machines, the secure session, the sum.
