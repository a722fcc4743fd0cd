"""From a graph and a budget to a program: stages, lowering, search, verification, report."""
