"""NovaCron's tests; the lab in here also serves `./dev lab` and `./dev demo`."""
