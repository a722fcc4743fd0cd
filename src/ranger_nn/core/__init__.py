"""Framework-free vocabulary: reach, links, graph, program. Enter at `graph.Graph` and `program.Program`."""
