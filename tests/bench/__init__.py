"""Measurements against their gates: `./dev bench`."""
