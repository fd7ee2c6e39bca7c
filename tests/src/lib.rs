//! End-to-end tests: real processes, sockets, checkpoints and clients.
