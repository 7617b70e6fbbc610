"""The integration level: real replica processes on a real etcd, real gRPC, simulated nodes."""
