"""DiffDis on Ray: recipes, evaluation, sweeps, comparison, sizing, serving, demo and the command line."""

import logging

from diffdis import __version__

__all__ = ["__version__"]

# diffusers imports bitsandbytes if it is installed, which then warns in every process that another optional package is not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
