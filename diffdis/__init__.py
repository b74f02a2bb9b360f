"""DiffDis (arXiv 2308.09306): one diffusion model that generates images and tells which text belongs to an image."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("diffdis-platform")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed, or the copy that MLflow stores with a model
    __version__ = "0+unknown"
