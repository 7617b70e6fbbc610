"""The typed changes that the applier takes: each decides, purely, what its change writes."""
