"""The driver's side of jobs/compare.py: what is left to do, one run of an arm, and what all runs say together."""
