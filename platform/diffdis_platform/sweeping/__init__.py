"""The driver's side of jobs/sweep.py and what its trials do: train and evaluate, each with values of its own."""
