"""Predicted throughput, memory, storage and cost of a run, from counted, measured and assumed values."""
