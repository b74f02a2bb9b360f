"""The demo: its data, emoji of nine families as LAION-style and CLIP_benchmark-style tars, and its report."""
