"""Decides where VMs run: pure functions over an immutable snapshot of the cluster."""
