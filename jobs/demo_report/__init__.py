"""What `make demo` shows of the trained model: zero-shot scores, a grid of generated images and a summary."""
