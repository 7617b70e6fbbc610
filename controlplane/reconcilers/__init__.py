"""The leader's loops, one a file. Each pass takes no input and looks at the state as it is."""
