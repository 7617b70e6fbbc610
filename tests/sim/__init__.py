"""The whole cluster in one process: real code, a virtual clock, one seed, faults, invariants."""
