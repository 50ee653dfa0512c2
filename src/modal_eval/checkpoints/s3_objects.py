"""What stands below an address on S3: which objects a model is made of, and what S3 knows of each.

Region, endpoint (`AWS_ENDPOINT_URL`), profile and credentials are boto3's own business; no message holds any of them.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from modal_eval.checkpoints.hub import WANTED_FILES
from modal_eval.errors import CheckpointError

SCHEME = "s3://"
CONNECTIONS = 16
"""One connection to S3 carries some 50 to 90 MB/s; a node's network takes many times that."""
CHECKSUMS = ("CRC64NVME", "CRC32C", "CRC32", "SHA256", "SHA1")
"""Those that S3 keeps, the cheapest to compute first."""
OTHER_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Loaded only where there is no safetensors file."""

Kind = Literal["folder", "gguf"]


class UnreachableError(CheckpointError):
    """S3 did not answer at all: a copy from before may do, or another try."""

    retryable = True


class RefusedError(CheckpointError):
    """S3 answered and gave nothing: rights, credentials, its own trouble. It may pass, and tells nothing of the content."""


@dataclass(frozen=True, slots=True)
class Address:
    """`s3://bucket/prefix`; the prefix has no slash at either end."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, typed: str) -> Self:
        bucket, _, prefix = typed.removeprefix(SCHEME).partition("/")
        if not bucket:
            raise CheckpointError(f"'{typed}' names no bucket; write s3://BUCKET/PREFIX/")
        return cls(bucket, prefix.strip("/"))

    @property
    def name(self) -> str:
        """The model's own name: the last part of the prefix."""
        return (self.prefix or self.bucket).rpartition("/")[2]

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """One object, as S3 describes it."""

    name: str
    """File name that it gets here."""
    key: str
    size: int
    etag: str
    """Without quotes; `…-N` for an upload in N parts."""
    algorithm: str | None
    """Which checksum S3 has for it, of `CHECKSUMS`."""
    checksum: str | None
    """Base64; `…-N` is a checksum over the checksums of N parts."""
    etag_is_md5: bool
    """Whether the ETag is made of MD5 sums; an object under a key of KMS or of the customer has another."""

    @property
    def parts(self) -> int | None:
        """Parts of its upload; `None` for an upload in one piece."""
        count = self.etag.rpartition("-")[2]
        return int(count) if "-" in self.etag and count.isdigit() else None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is fetched for one model."""

    address: Address
    kind: Kind
    objects: tuple[RemoteObject, ...]

    @property
    def size(self) -> int:
        return sum(one.size for one in self.objects)

    def digest(self) -> str:
        """SHA-256, in hex, over names, sizes, ETags and checksums; the address is no part of it."""
        rows = [[one.name, one.size, one.etag, one.algorithm, one.checksum] for one in self.objects]
        return hashlib.sha256(json.dumps([self.kind, rows]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "objects": [asdict(one) for one in self.objects]}


@dataclass(frozen=True, slots=True)
class Access:
    """How AWS is reached, where that is not what boto3 finds on this machine by itself."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)


def open_client(service: Literal["s3", "sqs"] = "s3", access: Access | None = None) -> Any:
    """A client of boto3, with its own settings but for `access`, retries, time limits and the number of connections."""
    import boto3  # slow to import, and only a model on S3 needs it
    from botocore.config import Config

    access = access or Access()
    config = Config(
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "max_attempts": 6},
        connect_timeout=10,
        read_timeout=60,
        response_checksum_validation="when_required",  # of a range nobody has one; the whole file is checked here
    )
    session = boto3.session.Session(
        aws_access_key_id=access.access_key_id,
        aws_secret_access_key=access.secret_access_key,
        region_name=access.region,
        profile_name=access.profile,
    )
    return session.client(service, endpoint_url=access.endpoint_url, config=config)


def client_for(address: Address, access: Access | None = None) -> Any:
    """A client for S3. Raises `CheckpointError` in one line where a setting is wrong before anything is asked."""
    try:
        return open_client("s3", access)
    except Exception as error:  # a profile that does not exist, an endpoint that is no URL: boto3 has many names for it
        given = ", and what the block gives in their place" if access and access != Access() else ""
        raise CheckpointError(
            f"S3 cannot be asked for {address} ({type(error).__name__}); check AWS_PROFILE, AWS_ENDPOINT_URL (with its "
            f"http:// or https://) and the region{given}"
        ) from error


def look(client: Any, address: Address, kind: Kind) -> Manifest:
    """List the model at `address` and ask for each object's checksum.

    A folder is the objects right below the address; what is deeper (`evals/`, optimizer states) is no part of the model.
    For `gguf` the address is a `.gguf` object, or a folder with one. Raises `CheckpointError` in one line.
    """
    with one_line(address):
        if kind == "gguf" and address.prefix.endswith(".gguf"):
            return Manifest(address, kind, (_head(client, address, address.prefix),))
        keys = [f"{_folder(address)}{name}" for name in wanted(_names(client, address), address, kind)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            objects = list(pool.map(lambda key: _head(client, address, key), keys))
    return Manifest(address, kind, tuple(sorted(objects, key=lambda one: one.name)))


def wanted(names: list[str], address: Address, kind: Kind) -> list[str]:
    """Of `names`, those that an engine loads."""
    if kind == "gguf":
        found = [name for name in names if name.endswith(".gguf")]
        if len(found) == 1:
            return found
        choice = f"it has {', '.join(found[:5])}: give one of them by its whole address" if found else "it has none"
        raise CheckpointError(f"llama.cpp loads one GGUF file, and {address} names none ({choice})")
    found = loadable(names)
    if not found:
        raise CheckpointError(
            f"{address} has {len(names)} objects and none of a model ({', '.join(names[:3])} …); give the address of "
            "the folder with config.json"
        )
    return found


def loadable(names: list[str]) -> list[str]:
    """Of the files right in a model's folder, those that an engine loads: on S3 and on a disk alike."""
    patterns = WANTED_FILES if any(name.endswith(".safetensors") for name in names) else (*WANTED_FILES, *OTHER_WEIGHTS)
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def part_sizes(client: Any, address: Address, one: RemoteObject, *, exactly: bool = False) -> list[int]:
    """How large the parts of an upload were. S3 tells it part by part; parts are equal but for the last, unless `exactly`."""

    def size(number: int) -> int:
        found = client.head_object(Bucket=address.bucket, Key=one.key, PartNumber=number, IfMatch=f'"{one.etag}"')
        return int(found["ContentLength"])

    count = one.parts or 1
    if count == 1:
        return [one.size]
    first = size(1)
    last = one.size - (count - 1) * first
    if not exactly and 0 < last <= first:
        return [first] * (count - 1) + [last]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(size, range(1, count + 1)))


def _folder(address: Address) -> str:
    return f"{address.prefix}/" if address.prefix else ""


def _names(client: Any, address: Address) -> list[str]:
    """Names right below the address."""
    prefix = _folder(address)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=address.bucket, Prefix=prefix, Delimiter="/")
    names: list[str] = []
    below: list[str] = []
    for page in pages:
        names += [entry["Key"][len(prefix) :] for entry in page.get("Contents", [])]
        below += [entry["Prefix"][len(prefix) : -1] for entry in page.get("CommonPrefixes", [])]
    names = [name for name in names if name]  # some tools leave an empty object for the folder itself
    if not names and below:
        more = f" and {len(below) - 5} more" if len(below) > 5 else ""
        raise CheckpointError(f"{address} holds no model but folders; give one of them: {', '.join(below[:5])}{more}")
    if not names:
        raise CheckpointError(f"{address} does not exist, or is empty{_near(client, address)}")
    return names


def _near(client: Any, address: Address) -> str:
    parent, _, leaf = address.prefix.rpartition("/")
    found = client.list_objects_v2(Bucket=address.bucket, Prefix=f"{parent}/" if parent else "", Delimiter="/")
    there = [entry["Prefix"].rstrip("/").rpartition("/")[2] for entry in found.get("CommonPrefixes", [])]
    nearest = difflib.get_close_matches(leaf, there, 3, 0.6) or there[:3]
    return f"; beside it are {', '.join(nearest)}" if nearest else "; check its name"


def _head(client: Any, address: Address, key: str) -> RemoteObject:
    found = client.head_object(Bucket=address.bucket, Key=key, ChecksumMode="ENABLED")
    etag = found["ETag"].strip('"')
    algorithm = next((name for name in CHECKSUMS if found.get(f"Checksum{name}")), None)
    checksum = found[f"Checksum{algorithm}"] if algorithm else None
    if checksum and "-" in etag and "-" not in checksum and "ChecksumType" not in found:
        algorithm = checksum = None  # some servers leave out whether it is one of the whole or one of the parts
    encrypted = found.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in found
    md5 = not encrypted and len(etag.partition("-")[0]) == 32
    return RemoteObject(key.rpartition("/")[2], key, int(found["ContentLength"]), etag, algorithm, checksum, md5)


@contextmanager
def one_line(address: Address) -> Iterator[None]:
    """Turn boto3's errors into a `CheckpointError` that says what to do. Never with their text: it may hold a key."""
    from botocore import exceptions as boto

    try:
        yield
    except boto.ClientError as error:
        raise RefusedError(_client_error(error, address)) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise RefusedError(
            f"no credentials for {address}; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except (boto.HTTPClientError, boto.ConnectionError) as error:  # nobody there, a broken line, a time-out
        raise UnreachableError(
            f"S3 cannot be reached for {address} ({type(error).__name__}); check the network, the region and "
            "AWS_ENDPOINT_URL"
        ) from error
    except boto.ParamValidationError as error:
        raise CheckpointError(f"{address} is no address that S3 could have; write s3://BUCKET/PREFIX/") from error
    except boto.BotoCoreError as error:
        raise RefusedError(
            f"S3 cannot be asked for {address} ({type(error).__name__}); check the AWS settings of this machine with "
            "`aws sts get-caller-identity`"
        ) from error


def _client_error(error: Any, address: Address) -> str:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    said: dict[str, Callable[[], str]] = {
        "NoSuchBucket": lambda: f"bucket {address.bucket} does not exist; check the name and AWS_ENDPOINT_URL",
        "InvalidBucketName": lambda: f"'{address.bucket}' is no bucket's name; write s3://BUCKET/PREFIX/",
        "InvalidAccessKeyId": lambda: f"S3 does not know the access key that was sent for {address}; check AWS_PROFILE",
        "SignatureDoesNotMatch": lambda: f"S3 refused the secret key that was sent for {address}; check AWS_PROFILE",
        "ExpiredToken": lambda: f"the credentials for {address} have expired; log in again",
        "PreconditionFailed": lambda: changed(address),
    }
    if code in said:
        return said[code]()
    if code in ("403", "AccessDenied", "AllAccessDisabled") or status == 403:
        return f"no access to {address}: the credentials need s3:ListBucket and s3:GetObject there"
    if code in ("404", "NoSuchKey", "NotFound"):
        return f"{address} does not exist, or went away while it was read; check its name"
    return f"S3 answered {code or status} for {address}; try again"


def changed(address: Address) -> str:
    return f"{address} changed while it was fetched, so it is still being written; try again once it is whole"
