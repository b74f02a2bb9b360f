"""Causes of failed workers: one line for the terminal with host, rank, cause and remedy, and Ray's messages in a file."""

import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform.contracts import ConfigError, DataError, one_line
from ray_platform.redaction import redacted

FAILURES = "failures.log"  # in output_dir: everything that Ray reported about each failure
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)
_EVIDENCE_TIMEOUT_S = 20.0
_LOG_BYTES = 2**18  # of the end of a worker's log
_FATAL = re.compile(rb"\*\*\* (SIG[A-Z]+) received|Fatal Python error: (Segmentation fault|Aborted|Bus error)")
_SIGNALS = {"Segmentation fault": "SIGSEGV", "Aborted": "SIGABRT", "Bus error": "SIGBUS"}
_LESS_MEMORY = "lower data.reads_per_rank, data.interleave or the workers per host, or use hosts with more memory"
_TRY_AGAIN = "if it happens again, try without this host, and with the versions of constraints.txt"


class Diverged(Exception):
    """The loss or its gradient was unusable in too many steps in a row."""


class Interrupted(Exception):
    """The workers were asked to stop. The message says why, and whether they saved a checkpoint."""


class AcceleratorFull(Exception):
    """An accelerator ran out of memory after the first step; a restart may help. The message says what to change."""


OURS = (ConfigError, DataError, Diverged, Interrupted, AcceleratorFull)  # errors whose message is complete


def find_cause(error: BaseException) -> tuple[BaseException, str]:
    """Return the error that a rank raised, and one line about it, without secrets.

    When one rank fails or dies, the collectives of the others fail after it. So our own errors come first, then dead workers.
    """
    failures = sorted(getattr(error, "worker_failures", {}).items()) or [(-1, error)]
    causes = [(rank, failure, _unwrap(failure)) for rank, failure in failures]
    rank, failure, cause = next((entry for kind in (OURS, DEATHS) for entry in causes if isinstance(entry[2], kind)), causes[0])
    line = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    if not isinstance(cause, OURS):
        worker, was_preempted = DeadWorker(rank, f"{failure}\n{cause}"), getattr(cause, "preempted", False)
        is_dead = isinstance(cause, DEATHS)
        line = worker.describe_death(was_preempted) if is_dead else f"{worker}: {type(cause).__name__}: {line}"
    return cause, redacted(line)


def _unwrap(failure: BaseException) -> BaseException:
    """Return the error inside of Ray's wrappers."""
    wrappers = ("health_check_failure", "controller_failure", "cause")
    while inner := next(filter(None, (getattr(failure, name, None) for name in wrappers)), None):
        failure = inner
    return failure


def save_messages(error: BaseException, output_dir: str) -> str:
    """Append everything that Ray reported about a failure to a file, and return its path; that of a local file for s3://."""
    folder = Path(tempfile.gettempdir()) if "://" in output_dir else Path(output_dir)
    file = folder / (FAILURES if folder == Path(output_dir) else f"diffdis-{os.getpid()}-{FAILURES}")
    with suppress(OSError), file.open("a", encoding="utf-8") as opened:
        opened.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{redacted(str(error))}\n\n")
    return str(file)


class DeadWorker:
    """A worker that failed, by what Ray reported about it."""

    def __init__(self, rank: int, report: str):
        """`report` is the text of Ray's errors; Ray has no public attributes for the process and its exit."""
        self.rank, self.report = rank, report
        self.host = self._find(r"hostname='([^']+)'") or self._find(r"^\s*ip: (\S+)$")
        self.node_id, self.pid = self._find(r"node_id='([0-9a-f]+)'"), self._find(r"\bpid[=:] ?(\d+)")

    def _find(self, pattern: str) -> str:
        match = re.search(pattern, self.report, re.M)
        return match[1] if match else ""

    def __str__(self) -> str:
        if self.rank < 0:
            return "the workers' controller"
        process = ", ".join(filter(None, (self.host, self.pid and f"pid {self.pid}")))
        return f"rank {self.rank}" + (f" ({process})" if process else "")

    def describe_death(self, was_preempted: bool) -> str:
        """Return the line about a process that ended without an error of its own."""
        if was_preempted:
            return f"{self}: its node was taken away by its cloud; add a node, or make the run elastic"
        if "its node has died" in self.report or "node was terminated" in self.report:
            reason = self._find(r"node was terminated[^:]*: (.*)$")
            return (
                f"{self}: its node was lost{f' ({one_line(reason, 120)})' if reason else ''}; add a node, or make the run elastic"
            )
        if re.search(r"running low on memory|memory usage threshold", self.report):
            used = self._find(r"([\d.]+ ?[GM]i?B ?/ ?[\d.]+ ?[GM]i?B)")
            return f"{self}: ended by Ray, because its host's memory was full{f' ({used})' if used else ''}; {_LESS_MEMORY}"
        if code := self._find(r"exits with an exit code (-?\d+)"):
            return f"{self}: exited with code {code}; its messages are above or in Ray's log of this process"
        if "killed by `ray.kill`" in self.report:
            return f"{self}: ended by ray.kill"
        if "connection error" not in self.report:
            return f"{self} died"
        return f"{self}: {self._describe_signal()}"

    def _describe_signal(self) -> str:
        """Tell apart the crashes that look the same to Ray: the end of a connection."""
        signal, log, num_oom_kills = self._gather_evidence()
        if signal:
            kind = {"SIGSEGV": "segmentation fault", "SIGBUS": "bus error", "SIGABRT": "aborted"}.get(signal, "crashed")
            return f"{kind} ({signal}) in a library; the stack is in {log}; {_TRY_AGAIN}"
        if num_oom_kills > 0:
            return (
                f"killed (SIGKILL), most likely because its host's memory was full: the kernel has killed {num_oom_kills} "
                f"processes there for that reason since it started; {_LESS_MEMORY}"
            )
        if num_oom_kills == 0:
            return "killed (SIGKILL) by another process, not by the kernel for lack of memory; inspect what else runs on the host"
        return f"killed (SIGKILL), by the kernel for lack of memory or by another process (see dmesg); for memory, {_LESS_MEMORY}"

    def _gather_evidence(self) -> tuple[str, str, int]:
        """Return the signal in the worker's log, the log's path, and the kernel's count of processes killed for lack of memory.

        The count is -1 if the node does not answer.
        """
        if not (self.node_id and self.pid and ray.is_initialized()):
            return "", "", -1
        strategy = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        with suppress(ray.exceptions.RayError):
            return ray.get(
                ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(read_evidence).remote(self.pid),
                timeout=_EVIDENCE_TIMEOUT_S,
            )
        return "", "", -1


def read_evidence(pid: str) -> tuple[str, str, int]:
    """Return what `_gather_evidence` returns; a Ray task on the node of the dead process."""
    folder = Path(os.path.realpath("/proc/self/fd/2")).parent  # of Ray's logs: this task's stderr is one of them
    return find_signal(folder, pid) or ("", "", count_oom_kills())


def find_signal(folder: Path, pid: str) -> tuple[str, str, int] | None:
    """Return the signal that the log of a process reports, the log's path, and -1; None without such a report."""
    for log in folder.glob(f"worker-*-{pid}.err"):
        with suppress(OSError), log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            if found := _FATAL.search(file.read()):
                name = (found[1] or found[2]).decode()
                return _SIGNALS.get(name, name), str(log), -1
    return None


def count_oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory, in this container or on this host; -1: not known."""
    for counters in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", Path(counters).read_text(), re.M):
                return int(found[1])
    return -1
