"""The configuration of object stores, `storage.*`: what the usual places of AWS cannot say.

Every process reads storage, so the settings travel as environment variables: `parse` sets them, and `connect` passes them on to
the workers.
"""

import os
import re
from dataclasses import dataclass

from ray_platform.contracts import ConfigError

PUBLIC_BUCKETS = "DIFFDIS_PUBLIC_BUCKETS"  # names, separated by commas
REQUESTER_PAYS_BUCKETS = "DIFFDIS_REQUESTER_PAYS_BUCKETS"


@dataclass(frozen=True)
class StorageConfig:
    """How buckets of S3 are accessed. Raises ConfigError for an invalid name."""

    public_buckets: tuple[str, ...] = ()
    """S3 buckets that are read without credentials."""
    requester_pays_buckets: tuple[str, ...] = ()
    """S3 buckets that charge your account for requests and transfers."""

    def __post_init__(self) -> None:
        for name in ("public_buckets", "requester_pays_buckets"):
            buckets = getattr(self, name)
            if isinstance(buckets, str):
                raise ConfigError(f"storage.{name}: {buckets!r} is a single value; give a list")
            for bucket in buckets:
                if not re.fullmatch(r"[\w.-]+", bucket):
                    raise ConfigError(f"storage.{name}: {bucket!r} is not a bucket's name; leave s3:// and folders out")
        if both := sorted(set(self.public_buckets) & set(self.requester_pays_buckets)):
            raise ConfigError(f"storage: {both[0]} is in both lists; requests that you pay for need credentials")

    def set_variables(self) -> None:
        """Set the environment variables, which may already name buckets."""
        for name, buckets in ((PUBLIC_BUCKETS, self.public_buckets), (REQUESTER_PAYS_BUCKETS, self.requester_pays_buckets)):
            if buckets:
                os.environ[name] = ",".join(sorted(named_buckets(name) | set(buckets)))


def named_buckets(variable: str) -> set[str]:
    """Return the buckets that an environment variable names."""
    return set(filter(None, os.environ.get(variable, "").split(",")))


def storage_variables() -> dict[str, str]:
    """Return the environment variables that are set, for the workers."""
    return {name: os.environ[name] for name in (PUBLIC_BUCKETS, REQUESTER_PAYS_BUCKETS) if os.environ.get(name)}
