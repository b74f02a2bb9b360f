"""What went wrong in storage: the errors of fsspec, s3fs, botocore and the network as a `StorageError` of one line."""

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import aiohttp
from botocore import exceptions as boto  # type: ignore[import-untyped]

from ray_platform.contracts import DataError, UserError, describe_error, one_line
from ray_platform.object_store import PACKAGES, READ_TIMEOUT_S, open_store, s3_endpoint
from ray_platform.redaction import redacted

# Errors of a local disk that no retry can fix.
_PERMANENT = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EINVAL}

# configuration: the credentials or the endpoint cannot be used, whatever the file.
Kind = Literal["missing", "forbidden", "archived", "unavailable", "configuration"]


class StorageError(DataError):
    """Error of a storage operation. `is_transient`: it may disappear by itself, so a retry makes sense."""

    def __init__(self, message: str, kind: Kind, is_transient: bool = True) -> None:
        super().__init__(message, kind, is_transient)
        self.kind = kind
        self.is_transient = kind == "unavailable" and is_transient

    def __str__(self) -> str:
        return redacted(self.args[0])


class Problem(NamedTuple):
    kind: Kind
    text: str
    is_transient: bool = True


class _Answer(NamedTuple):
    """An answer of S3 that is an error."""

    code: str
    message: str
    status: int
    operation: str


_EXPIRED = Problem(
    "configuration",
    "the credentials have expired; renew them (`aws sso login`, or a new AWS_SESSION_TOKEN) and run the same command again",
)
_REJECTED = Problem(
    "configuration", "the server rejects the credentials ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE"
)
_NO_CREDENTIALS = Problem(
    "configuration",
    "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, use a profile or a role, "
    "or name the bucket in storage.public_buckets",
)
_WRONG_REGION = Problem(
    "configuration",
    "its bucket is in another region or at another endpoint ({code}); correct AWS_DEFAULT_REGION or AWS_ENDPOINT_URL",
)
_DENIED = Problem(
    "forbidden",
    "access denied (403); check the bucket's policy and the permissions of AWS_ACCESS_KEY_ID or AWS_PROFILE, "
    "or name the bucket in storage.public_buckets or storage.requester_pays_buckets",
)
_NO_BUCKET = Problem("missing", "its bucket does not exist; correct the name or create it")
_BUCKET_NAME = Problem(
    "configuration", "its bucket's name is not valid; use 3 to 63 lower-case letters, digits, dots and hyphens"
)
_BUSY = Problem("unavailable", "the server is overloaded or fails ({code}); wait, or lower the number of concurrent reads")
_BY_CODE = {
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "InvalidToken": _REJECTED,
    "InvalidAccessKeyId": _REJECTED,
    "InvalidClientTokenId": _REJECTED,
    "SignatureDoesNotMatch": _REJECTED,
    "UnrecognizedClientException": _REJECTED,
    "RequestTimeTooSkewed": Problem("configuration", "this machine's clock differs from the server's; correct the clock"),
    "AuthorizationHeaderMalformed": _WRONG_REGION,
    "PermanentRedirect": _WRONG_REGION,
    "TemporaryRedirect": _WRONG_REGION,
    "IllegalLocationConstraintException": _WRONG_REGION,
    "301": _WRONG_REGION,
    "307": _WRONG_REGION,
    "InvalidObjectState": Problem("archived", "is in an archive (Glacier); restore it, or copy it to another storage class"),
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "403": _DENIED,
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _BUCKET_NAME,
    "SlowDown": _BUSY,
    "InternalError": _BUSY,
    "ServiceUnavailable": _BUSY,
    "RequestTimeout": _BUSY,
}
# Requests for credentials, in which every error means that there are none.
_CREDENTIAL_OPERATIONS = ("AssumeRole", "AssumeRoleWithWebIdentity", "GetRoleCredentials", "CreateToken")
_SSO_ERRORS = (boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError, boto.TokenRetrievalError)
_NETWORK_ERRORS = (
    boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, aiohttp.ClientError, TimeoutError, ConnectionError,
)  # fmt: skip


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn the errors of every client into a `StorageError` of one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if url.partition("://")[0] in PACKAGES:
            problem = _store_problem(error)
        elif isinstance(error, OSError | boto.BotoCoreError | boto.ClientError | aiohttp.ClientError | RecursionError):
            problem = _s3_problem(url, error) if url.startswith("s3://") else _problem(error)
        else:
            raise
        raise StorageError(f"{url}: {problem.text}", problem.kind, problem.is_transient) from None


def _problem(error: BaseException) -> Problem:
    """Describe an error of a disk."""
    if isinstance(error, FileNotFoundError):
        return Problem("missing", "no such file or folder; correct the path")
    if isinstance(error, PermissionError):
        return Problem("forbidden", "permission denied; correct the owner or the mode of the file")
    is_transient = getattr(error, "errno", None) not in _PERMANENT
    return Problem("unavailable", f"{one_line(error)}; check that the path can be read and written", is_transient)


def _store_problem(error: Exception) -> Problem:
    """Describe an error of a store other than S3. Each of their clients has exceptions of its own."""
    status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return _problem(FileNotFoundError())
    if isinstance(error, PermissionError) or status in (401, 403):
        return Problem("forbidden", "access denied; check the credentials of this store and their permissions")
    is_transient = not isinstance(error, NotImplementedError) and not (isinstance(status, int) and 400 <= status < 500)
    text = f"{describe_error(error)}; check the URL, the credentials of this store and the network"
    return Problem("unavailable", text, is_transient)


def _s3_problem(url: str, error: BaseException) -> Problem:
    if answer := _answer(error) or _answer(error.__cause__):
        return _answer_problem(url, answer)
    if isinstance(error, FileNotFoundError):
        return _NO_BUCKET if "bucket does not exist" in str(error) else _problem(error)
    if isinstance(error, PermissionError):
        return _DENIED
    if isinstance(error, RecursionError):  # of `object_store`: a redirect that names no region
        return _fill(_WRONG_REGION, code="PermanentRedirect")
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return _NO_CREDENTIALS
    if isinstance(error, _SSO_ERRORS):
        return _EXPIRED
    if isinstance(error, boto.ProfileNotFound):
        return Problem("configuration", f"{one_line(error)}; correct AWS_PROFILE, or write the profile to ~/.aws/config")
    if isinstance(error, _NETWORK_ERRORS):
        return _network_problem(error)
    if isinstance(error, boto.BotoCoreError):
        return Problem("configuration", f"{one_line(error)}; correct the AWS configuration (AWS_… variables, ~/.aws)")
    return _problem(error)


def s3_code(error: BaseException) -> str:
    """Return the code of S3's answer, such as NoSuchKey; empty if the error is not one."""
    answer = _answer(error) or _answer(error.__cause__)
    return answer.code if answer else ""


def _answer(error: BaseException | None) -> _Answer | None:
    if not isinstance(error, boto.ClientError):
        return None
    answer, about = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    return _Answer(
        str(answer.get("Code", "")), str(answer.get("Message", "")), about.get("HTTPStatusCode", 0), str(error.operation_name)
    )


def _answer_problem(url: str, answer: _Answer) -> Problem:
    code, message, status, operation = answer
    if code in ("400", "403") and operation.startswith("Head"):  # such answers have no text
        code, message = _repeated_by_get(url) or (code, message)
    if operation in _CREDENTIAL_OPERATIONS and _BY_CODE.get(code) is not _EXPIRED:
        text = f"no S3 credentials ({operation}: {code}: {one_line(message)}); check AWS_PROFILE, the role and its policy"
        return Problem("configuration", text)
    if code in _BY_CODE:
        return _fill(_BY_CODE[code], code=code)
    if code in ("404", "NoSuchKey"):
        return _problem(FileNotFoundError())
    if status >= 500 or status == 429:
        return _fill(_BUSY, code=code)
    is_transient = not 400 <= status < 500
    return Problem("unavailable", f"the server answered {code} ({one_line(message)}); check the URL and the server", is_transient)


def _repeated_by_get(url: str) -> tuple[str, str] | None:
    """Return the code and the message of the answer to a request whose errors have a text."""
    filesystem, path = open_store(url)
    bucket, _, key = path.partition("/")
    try:
        if key:
            filesystem.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        else:
            filesystem.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except Exception as error:  # whatever it is, there is the first answer
        answer = _answer(error.__cause__)
        return answer[:2] if answer and answer.code not in ("404", "NoSuchKey") else None
    return None


def _fill(problem: Problem, code: str) -> Problem:
    return problem._replace(text=problem.text.format(code=code))


def _network_problem(error: BaseException) -> Problem:
    """Describe an error without an answer of the server."""
    endpoint = (s3_endpoint() or "AWS's own").rpartition("@")[2]
    causes = list(_causes(error))
    if tls_error := next((cause for cause in reversed(causes) if isinstance(cause, ssl.SSLError)), None):
        if isinstance(tls_error, ssl.SSLCertVerificationError):
            problem = f"the certificate of the S3 endpoint ({endpoint}) is not trusted ({tls_error.verify_message})"
            advice = "name a file with the certificate of its authority in AWS_CA_BUNDLE, or correct AWS_ENDPOINT_URL"
        else:
            problem = f"the S3 endpoint ({endpoint}) does not answer in TLS ({tls_error.reason})"
            advice = "check whether AWS_ENDPOINT_URL should start with http://"
        return Problem("configuration", f"{problem}; {advice}")
    if isinstance(error, boto.ProxyConnectionError):
        proxy = redacted(str(error.kwargs["proxy_url"]))
        return Problem("unavailable", f"cannot reach the proxy ({proxy}; {_reason(causes)}); check HTTPS_PROXY and HTTP_PROXY")
    text = f"cannot reach the S3 endpoint ({endpoint}; {_reason(causes)}); check AWS_ENDPOINT_URL and the network"
    return Problem("unavailable", text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(causes: list[BaseException]) -> str:
    """Return why a server was not reached, in a few words."""
    for cause in reversed(causes):
        if isinstance(cause, socket.gaierror):
            return "its name cannot be resolved"
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, TimeoutError | boto.ReadTimeoutError | boto.ConnectTimeoutError):
            return f"no answer within {READ_TIMEOUT_S} s"
    innermost = causes[-1]
    return (innermost.strerror if isinstance(innermost, OSError) and innermost.strerror else type(innermost).__name__).lower()
