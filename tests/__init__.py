"""This file makes `tests` a package. Otherwise Python would import the `tests` package that clip-benchmark installs."""
