"""Whether workers that are gone start again: what a failure was, in one line, and whether another try can help."""

from collections.abc import Callable

import ray

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, TrainingError
from ray_platform.retry import RETRY_SECONDS
from ray_platform.train.guard import Diverged


class Stopped(TrainingError):
    """By SIGTERM. Whoever sent it wants nothing else to begin either."""


class Interrupted(Exception):
    """The workers were told to stop. The message says why, and whether they could save."""


class AcceleratorFull(Exception):
    """While training, where what else was on it may be gone at the next try. The message says what to do."""


class Restarts:
    """They do until they are done, or have failed too often at one place, or were told to stop for good."""

    def __init__(self, max_failures: int, newest: Callable[[], str]):
        """`newest` finds the newest checkpoint of this launch; empty where there is none."""
        self.max_failures, self.newest = max_failures, newest
        self.failures, self.last = 0, ""

    def judge(self, error: Exception, hang: str, stopping: bool) -> str:
        """Returns a line for the log about what goes on from where. Raises TrainingError where nothing does; Stopped on SIGTERM.

        `hang`: what the watch said when it ended the workers, else empty. `stopping`: SIGTERM came, and the run shall not go on.
        """
        cause, line = cause_of(error)
        line = hang or line
        if stopping and not is_final(cause):
            said = line if isinstance(cause, Interrupted) else f"stopped by SIGTERM, and could not save at once: {line}"
            raise Stopped(f"{said}; {self._left()}") from None
        if is_final(cause):
            raise TrainingError(line) from error
        with storage.retrying_for(RETRY_SECONDS):
            made = self.newest()
        if made != self.last:
            self.failures, self.last = 0, made
        self.failures += not isinstance(cause, Interrupted)
        if self.failures > self.max_failures:
            raise TrainingError(f"{line} (failure {self.failures} without a new checkpoint; train.max_failures)") from error
        return f"{line}; going on from {made or 'where this launch began'}"

    def _left(self) -> str:
        """What a run that was stopped can go on from. It is asked for once: whoever stops a run does not wait."""
        try:
            made = self.newest()
        except storage.StorageError as error:
            return f"its checkpoints cannot be listed ({error})"
        return f"go on from {made} with --resume auto" if made else "this launch has made no checkpoint"


def is_final(cause: BaseException) -> bool:
    """Whether to start again would only end the same way."""
    if isinstance(cause, storage.StorageError):
        return cause.kind != "unavailable"
    return isinstance(cause, ConfigError | DataError | Diverged)


def cause_of(error: BaseException) -> tuple[BaseException, str]:
    """(what a rank raised, one line): an error of ours speaks for itself, another one is named by its type."""
    failures = sorted(getattr(error, "worker_failures", {}).items()) or [(-1, error)]
    causes = [(rank, _unwrapped(failure)) for rank, failure in failures]
    # Where one rank fails or dies, the others' collectives fail after it: what is ours is the cause, else who died.
    ours, died = (ConfigError, DataError, Diverged, Interrupted, AcceleratorFull), ray.exceptions.RayActorError
    rank, cause = next(((r, c) for kind in (ours, died) for r, c in causes if isinstance(c, kind)), causes[0])
    line = _first_line(cause)
    if isinstance(cause, ours):
        return cause, line
    who = f"worker {rank}" if rank >= 0 else "the workers' controller"
    return cause, f"{who} died" if isinstance(cause, died) else f"{who}: {type(cause).__name__}: {line}"


def _unwrapped(failure: BaseException) -> BaseException:
    """Ray wraps what a task or an actor raised, and how it ended."""
    wrappers = ("health_check_failure", "controller_failure", "cause")
    while inner := next(filter(None, (getattr(failure, name, None) for name in wrappers)), None):
        failure = inner
    return failure


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
