"""The replicas: one leader decides and commits, every replica answers."""
