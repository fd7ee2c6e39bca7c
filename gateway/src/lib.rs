//! HTTP sidecar: OpenAI and Anthropic JSON to gRPC and back.
