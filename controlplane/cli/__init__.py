"""The `novacron` command: a client of the HTTP API, and the maker of a cell's first files."""
