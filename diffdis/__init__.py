"""DiffDis (arXiv 2308.09306): one diffusion model that generates images and tells which text belongs to an image."""

__version__ = "0.1.0"
