"""Builds the demo data: emoji drawings of nine families as LAION-style and CLIP_benchmark-style tars."""
