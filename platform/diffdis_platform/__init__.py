"""DiffDis on Ray: recipes, evaluation, sweeps, comparison, sizing, serving, demo and the command line."""

from diffdis import __version__

__all__ = ["__version__"]
