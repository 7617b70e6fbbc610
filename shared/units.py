"""Sizes, in one place, so that no module multiplies by its own idea of a megabyte."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
