"""A network as a graph: its operations, and how it is traced."""
