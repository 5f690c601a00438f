"""Runtime: strict recipes, atomic artifacts, random streams, ranks, progress, loading models. No mathematics."""
