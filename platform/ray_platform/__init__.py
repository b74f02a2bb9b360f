import gc

# Importing torch and diffusers creates a million objects that live as long as the process. With Python's thresholds, collecting
# garbage among them takes a fifth of the start of every worker.
gc.set_threshold(50_000, 20, 50)
