"""The one error that a build stops with: a single line that says what was wrong and what to do."""


class DemoDataError(Exception):
    """The demo data cannot be built; the message names the file or icon, the cause and the way out."""
