"""The HTTP API: one table of routes over the use cases; nothing here decides about the cluster."""
