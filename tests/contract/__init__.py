"""One suite of tests for each port; the fake and the real implementation both pass it."""
