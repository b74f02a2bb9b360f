"""Evaluation of models: what is measured, its units of work, and the results. Joins `diffdis` and `ray_platform`."""
