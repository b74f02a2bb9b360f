"""Controlled comparison: the (arm, seed) runs of jobs/compare.py, their statistics and the paper's claim."""
