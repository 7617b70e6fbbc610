"""Work of several steps that spans nodes or must be undone: the engine, and one workflow a file."""
