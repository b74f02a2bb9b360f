"""Sizes and durations as short texts for people."""


def size_text(num_bytes: float) -> str:
    """Return a size with its decimal unit: `999 B`, `1.5 kB`, `120 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 99.95 else f"{num_bytes:.1f} {unit}"


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit of which there are at least two: `90.0 s`, `2.5 h`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
