//! The router process around the core: gRPC, text pool, workers' streams, metrics.
