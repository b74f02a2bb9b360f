"""Run a `diffdis` command in this process."""

import contextlib
import io

from diffdis_platform.cli import run_command


def error_of(name: str, *arguments: str) -> str | None:
    """Run a command. Returns the line that it prints to stderr, or None if it succeeds."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = run_command(name, arguments)
    return stderr.getvalue().splitlines()[-1] if status else None
