"""Backups of the control plane: the file, and what a restore makes of it."""
