"""The lease of an output folder, which one launch at a time holds: two launches would train the same steps, each for itself.

The holder renews its lease every few seconds. Another launch that finds the lease is rejected. It takes a stale lease over: one
that stays the same while the other launch watches it, or, on the same machine, one whose process has ended. Nothing depends on
the clocks of two hosts.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from ray_platform import storage
from ray_platform.contracts import ConfigError, UserError, describe_error
from ray_platform.formats import FileFormat, NewerFormatError

logger = logging.getLogger(__name__)

LEASE = "lease.json"  # in output_dir
LEASE_FORMAT = FileFormat("lease")
RENEWAL_SECONDS = 10.0
STALE_SECONDS = 45.0  # without a renewal, for a launch on another machine
_POLL_SECONDS = 2.0
_SETTLE_SECONDS = 3.0  # after a takeover, for another launch that takes the same lease over


@dataclass(frozen=True)
class Holder:
    """The launch that holds a lease: the content of the file."""

    launch: str
    host: str
    pid: int
    started: str  # of the process, in ticks since the machine's boot
    machine: str  # the boot and the PID namespace in which `pid` is valid; empty: not known
    ray_job: str  # submission id; empty: not submitted
    token: str  # new for every lease
    renewals: int = 0
    renewed_at: str = ""  # by the holder's clock, for people

    def __str__(self) -> str:
        job = f", Ray job {self.ray_job}" if self.ray_job else ""
        return f"launch {self.launch} (host {self.host}, pid {self.pid}{job})"

    @classmethod
    def current(cls, launch: str) -> "Holder":
        """Return this process as a holder."""
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
        pid, token = os.getpid(), uuid.uuid4().hex
        return cls(launch, socket.gethostname(), pid, _start_of(pid), _machine(), job.get("job_submission_id", ""), token)

    def is_running(self) -> bool | None:
        """Return whether the process exists; None if this cannot be seen from here."""
        if not self.machine or self.machine != _machine() or not _start_of(1):  # processes may be hidden
            return None
        return _start_of(self.pid) == self.started

    def to_bytes(self) -> bytes:
        return (json.dumps(LEASE_FORMAT.stamp(asdict(self)), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> "Holder | None":
        """Parse what `to_bytes` wrote; None for a damaged file. Raises NewerFormatError."""
        try:
            return cls(**LEASE_FORMAT.read(json.loads(data), [one.name for one in fields(cls)], url))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since the machine's boot; empty if it does not exist or has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


class Lease:
    """Lease that this process holds within a `with` block, and renews in a thread."""

    def __init__(self, output_dir: str, launch: str, wait: Callable[[float], object] = time.sleep):
        """`wait` is called with the seconds between two looks at another launch's lease."""
        self.output_dir, self.url = output_dir, storage.join(output_dir, LEASE)
        self.lost = ""  # why this launch must stop: another one has taken the lease over
        self._holder, self._wait = Holder.current(launch), wait
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew_regularly, daemon=True, name="lease")

    def __enter__(self) -> "Lease":
        """Take the lease. Raises ConfigError if another launch holds it, and StorageError."""
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lease, unless another launch has it."""
        self._done.set()
        self._thread.join()
        try:
            self.renew()
            if not self.lost:
                storage.delete(self.url)
        except UserError as error:
            logger.warning("the lease could not be released, so that the next launch waits %.0f s: %s", STALE_SECONDS, error)

    def renew(self) -> None:
        """Renew the lease, or set `lost`. Raises StorageError, or ConfigError if an S3 client cannot be configured."""
        with storage.retrying_for(0):
            content, holder = self._read(), None
            with contextlib.suppress(NewerFormatError):
                holder = Holder.from_bytes(content, self.url) if content else None
            if holder and holder.token == self._holder.token:
                self._write()
            elif not self.lost:
                who = holder or f"another launch ({LEASE} is missing, damaged or of a newer version)"
                self.lost = f"output_dir: {self.output_dir} was taken over by {who}; this launch ended without saving"

    def _renew_regularly(self) -> None:
        is_failing = False
        while not self._done.wait(RENEWAL_SECONDS) and not self.lost:
            try:
                self.renew()
                is_failing = False
            except Exception as error:  # without this thread, a takeover is not noticed, and two launches train
                if not is_failing:
                    logger.warning("the lease could not be renewed (logged once); training continues: %s", describe_error(error))
                is_failing = True

    def _take(self) -> None:
        first, seconds = None, 0.0
        while not storage.create_bytes(self.url, self._holder.to_bytes()):
            content = self._read()
            if content is None:  # it was released
                continue
            holder = Holder.from_bytes(content, self.url)
            is_running = holder.is_running() if holder else None
            if is_running or (first is not None and content != first):
                raise self._in_use(holder)
            if is_running is False or seconds >= STALE_SECONDS:
                how = "whose process has ended" if is_running is False else f"which was not renewed for {seconds:.0f} s"
                logger.warning("output_dir: %s: taking over the lease of %s, %s", self.output_dir, _name(holder), how)
                self._take_over()
                return
            if first is None:
                first = content
                logger.warning(
                    "output_dir: %s has a lease of %s; waiting up to %.0f s to see whether it is renewed",
                    *(self.output_dir, _name(holder), STALE_SECONDS),
                )
            self._wait(_POLL_SECONDS)
            seconds += _POLL_SECONDS

    def _take_over(self) -> None:
        self._write()
        self._wait(_SETTLE_SECONDS)
        content = self._read()
        holder = Holder.from_bytes(content, self.url) if content else None
        if holder is None or holder.token != self._holder.token:
            raise self._in_use(holder)

    def _in_use(self, holder: Holder | None) -> ConfigError:
        return ConfigError(
            f"output_dir: {self.output_dir} is in use by {_name(holder)}; stop that launch, or give another output_dir"
        )

    def _read(self) -> bytes | None:
        try:
            return storage.read_small(self.url)
        except storage.StorageError as error:
            if error.kind == "missing":
                return None
            raise

    def _write(self) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._holder = replace(self._holder, renewals=self._holder.renewals + 1, renewed_at=now)
        storage.write_bytes(self.url, self._holder.to_bytes())


def _name(holder: Holder | None) -> str:
    return str(holder) if holder else f"an unknown launch ({LEASE} is damaged)"
