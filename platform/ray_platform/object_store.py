"""Clients of object stores.

S3 has two clients: s3fs, which supports everything, and Arrow's, which reads faster. Both get the configuration that botocore
resolves from the usual AWS places: variables, profiles, the services section, roles. The clients of other stores configure
themselves.
"""

import functools
import importlib.util
import os
import re
import ssl
import urllib.request
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import botocore.session  # type: ignore[import-untyped]
import fsspec
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from botocore.exceptions import NoCredentialsError  # type: ignore[import-untyped]
from botocore.httpsession import get_cert_path  # type: ignore[import-untyped]
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

from ray_platform.contracts import ConfigError, DataError
from ray_platform.storage_config import PUBLIC_BUCKETS, REQUESTER_PAYS_BUCKETS, named_buckets

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20  # without a byte
# The package of each other store's client, as it is installed and as it is imported.
PACKAGES = {
    "gs": ("gcsfs", "gcsfs"),
    "gcs": ("gcsfs", "gcsfs"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "abfss": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
    "http": ("aiohttp", "aiohttp"),
    "https": ("aiohttp", "aiohttp"),
}
_BUCKET = re.compile(r"[\w.-]{1,255}$|arn:", re.ASCII)
# AWS endpoints that Arrow's client does not know.
_SPECIAL_ENDPOINTS = ("use_dualstack_endpoint", "use_fips_endpoint", "use_accelerate_endpoint")
_MAX_HEAD_BUCKETS = 20  # in one operation
_num_head_buckets: ContextVar[int] = ContextVar("num_head_buckets", default=0)  # in the current operation


class Environment(NamedTuple):
    """Everything that the configuration of S3 is read from: clients are replaced when it changes."""

    process: int  # clients do not survive a fork
    variables: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, int], ...]  # with the times at which they were changed

    @classmethod
    def current(cls) -> "Environment":
        variables = [
            (name, value) for name, value in os.environ.items() if name.startswith("AWS_") or name.lower().endswith("_proxy")
        ]
        files = (
            os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
            os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        )
        return cls(os.getpid(), tuple(sorted(variables)), tuple(map(_changed_at, files)))


def _changed_at(file: str) -> tuple[str, int]:
    path = os.path.expanduser(file)
    try:
        return path, os.stat(path).st_mtime_ns
    except OSError:
        return path, 0


@dataclass(frozen=True)
class S3Settings:
    """The configuration of S3."""

    endpoint: str  # a URL; empty: AWS's own
    region: str  # empty: not configured
    ca_file: str  # certificates of authorities; empty: those of the package certifi
    proxy: str  # a URL; empty: none
    addressing_style: str  # path, virtual or auto
    arrow_follows: bool  # whether Arrow's client supports all of it
    session: Any = field(compare=False, repr=False)  # of botocore, which renews credentials that expire


def open_store(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it. Raises DataError for one that cannot be used."""
    scheme, _, path = url.partition("://")
    if scheme == "s3":
        bucket = path.partition("/")[0]
        if "@" in bucket:
            raise DataError(
                f"{url}: contains credentials (before an @); leave them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if not _BUCKET.match(bucket):
            raise DataError(f"{url}: names no bucket; write s3://bucket/folder, without a pattern in the bucket's name")
        return _s3fs(Environment.current(), *_access(bucket)), path.rstrip("/")
    if scheme not in PACKAGES or "::" in path:  # fsspec would chain file systems
        stores = ", ".join(f"{name}://" for name in ("s3", *PACKAGES))
        raise DataError(f"{url}: cannot read {scheme}://; name a folder, or a URL of one of {stores}")
    package, module = PACKAGES[scheme]
    if importlib.util.find_spec(module) is None:
        raise DataError(f"{url}: {scheme}:// needs a package that is not installed; run `pip install {package}`")
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return filesystem, path.rstrip("/")


def arrow_filesystem(bucket: str) -> S3FileSystem | None:
    """Return Arrow's client for a bucket, or None if only s3fs supports the configuration."""
    environment = Environment.current()
    settings = _s3_settings(environment)
    is_public, requester_pays = _access(bucket)
    if not settings.arrow_follows or requester_pays or bucket.startswith("arn:"):
        return None
    if is_public:
        return _arrow(environment, bucket, None)
    credentials = settings.session.get_credentials()
    if credentials is None:
        raise NoCredentialsError
    return _arrow(environment, bucket, credentials.get_frozen_credentials())  # renewed credentials make another client


def _access(bucket: str) -> tuple[bool, bool]:
    """Return whether a bucket is read without credentials, and whether the requester pays."""
    return bucket in named_buckets(PUBLIC_BUCKETS), bucket in named_buckets(REQUESTER_PAYS_BUCKETS)


def s3_endpoint() -> str:
    """Return the configured S3 endpoint, a URL; empty for AWS's own."""
    return _s3_settings(Environment.current()).endpoint


@functools.lru_cache(maxsize=4)
def _s3_settings(environment: Environment) -> S3Settings:
    """Resolve the configuration. Raises ConfigError for a value that no client can use, and botocore's errors."""
    session = botocore.session.get_session()
    endpoint, s3 = _endpoint(session), session.get_config_variable("s3") or {}
    # A server of one's own seldom has a DNS name per bucket.
    style = s3.get("addressing_style") or ("path" if endpoint else "auto")
    server = urlsplit(endpoint or "https://s3.amazonaws.com")
    proxy = "" if urllib.request.proxy_bypass(server.netloc) else urllib.request.getproxies().get(server.scheme, "")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    special = any(s3.get(name) or session.get_config_variable(name) for name in _SPECIAL_ENDPOINTS)
    proxy_with_tls = bool(proxy) and (proxy.startswith("https:") or bool(session.get_config_variable("proxies_config")))
    ca_file = os.path.expanduser(session.get_config_variable("ca_bundle") or "")
    if ca_file:
        _check_ca_file(ca_file)
    return S3Settings(
        endpoint,
        session.get_config_variable("region") or "",
        ca_file,
        proxy,
        style,
        arrow_follows=not special and not proxy_with_tls and (bool(endpoint) or style != "path"),
        session=session,
    )


def _endpoint(session: Any) -> str:
    """Return the endpoint in botocore's order: the variables, the services section of the profile, the profile."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return ""
    profile = session.get_scoped_config()
    service = session.full_config.get("services", {}).get(profile.get("services", ""), {}).get("s3", {})
    places = {name: os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")}
    places["endpoint_url (in ~/.aws/config)"] = service.get("endpoint_url") or profile.get("endpoint_url") or ""
    for place, url in places.items():
        if url:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                host = url.rpartition("://")[2] or "host:port"
                raise ConfigError(f"{place}: {url} is not a URL; write http://{host} or https://{host}")
            return url.rstrip("/")
    return ""


def _check_ca_file(path: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        problem = "is not a file of certificates" if os.path.isfile(path) else "does not exist"
        raise ConfigError(f"AWS_CA_BUNDLE: {path} {problem}; name a PEM file with the certificates of authorities") from error


def _limit_redirects(**_: object) -> None:
    """After a redirect that names no region, botocore asks the bucket for it, also if that question itself was redirected."""
    _num_head_buckets.set(_num_head_buckets.get() + 1)
    if _num_head_buckets.get() > _MAX_HEAD_BUCKETS:
        raise RecursionError("a redirect that names no region")


@functools.lru_cache(maxsize=8)
def _s3fs(environment: Environment, is_public: bool, requester_pays: bool) -> Any:
    settings, session = _s3_settings(environment), AioSession()

    def attempt_more(**_: object) -> None:
        filesystem.retries = type(filesystem).retries

    session.register("before-call.s3.HeadBucket", _limit_redirects)
    session.register("after-call.s3", attempt_more)
    config = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "retries": {"total_max_attempts": 1},  # of botocore; s3fs attempts each call several times by itself
        "s3": {"addressing_style": settings.addressing_style},
    }
    client = {"region_name": settings.region, "verify": settings.ca_file}
    filesystem = fsspec.filesystem(
        "s3",
        session=session,
        anon=is_public,
        requester_pays=requester_pays,
        skip_instance_cache=True,  # its key would not contain the environment
        use_listings_cache=False,  # what other processes write must be visible
        endpoint_url=settings.endpoint or None,
        client_kwargs={name: value for name, value in client.items() if value},
        config_kwargs=config,
    )
    filesystem.retries = 1  # until the endpoint has answered: one that does not is reported after a single timeout
    return filesystem


@functools.lru_cache(maxsize=8)
def _arrow(environment: Environment, bucket: str, credentials: Any) -> S3FileSystem:
    settings = _s3_settings(environment)
    scheme, _, host = settings.endpoint.rpartition("://")
    s3fs = _s3fs(environment, *_access(bucket))
    region = settings.region if settings.endpoint else _bucket_region(s3fs, bucket) or settings.region
    access_key, secret_key, token = credentials[:3] if credentials else (None, None, None)
    return S3FileSystem(
        access_key=access_key,
        secret_key=secret_key,
        session_token=token,
        anonymous=credentials is None,
        region=region or "us-east-1",
        scheme=scheme or "https",
        endpoint_override=host or None,
        force_virtual_addressing=settings.addressing_style == "virtual",
        proxy_options=settings.proxy or None,
        tls_ca_file_path=settings.ca_file or get_cert_path(True),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
    )


def _bucket_region(filesystem: Any, bucket: str) -> str | None:
    """Return the region of a bucket of AWS. s3fs follows AWS's redirects to it, Arrow does not."""
    try:
        response = filesystem.call_s3("head_bucket", Bucket=bucket)
    except OSError as error:  # also an answer that denies access has the header
        response = getattr(error.__cause__, "response", {})
    return response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
