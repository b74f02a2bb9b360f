"""A package of its own: otherwise the `tests` that clip-benchmark installs would be found instead."""
