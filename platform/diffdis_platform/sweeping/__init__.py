"""Sweeps of jobs/sweep.py: the fields that they vary, their trials and their report."""
