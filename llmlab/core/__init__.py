"""Floor 0: what every room stands on. Config, array helpers, mesh and partitioning, paths, errors. Imports no room."""
