"""What `./dev build` makes: the files that a release is installed from, without any network."""
