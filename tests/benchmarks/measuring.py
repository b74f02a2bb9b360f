"""Interleaved measurements: each round measures every contender once, so that other load on the machine affects all equally."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Measured = dict[str, list[float]]  # contender -> one value per round


def in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Measured:
    """Return the values of `rounds` rounds, after `warm_up` discarded rounds. Prints each round to standard error."""
    measured: Measured = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        values = {name: call() for name, call in contenders.items()}
        if number >= warm_up:
            for name, value in values.items():
                measured[name].append(value)
            print({name: float(f"{value:.4g}") for name, value in values.items()}, file=sys.stderr, flush=True)
    return measured


def medians(measured: Measured, digits: int = 2) -> dict[str, float]:
    return {name: round(statistics.median(values), digits) for name, values in measured.items()}


def ratio(measured: Measured, over: str, under: str) -> float:
    """Return the median over rounds of the ratio `over` / `under`."""
    return round(statistics.median(a / b for a, b in zip(measured[over], measured[under], strict=True)), 3)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
