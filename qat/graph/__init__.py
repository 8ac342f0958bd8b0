"""A network as a graph: tracing, the kinds of operations, and ways to walk and run it."""
