"""Where news of checkpoints comes from: a listing of a prefix, or S3's notifications in an SQS queue."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote_plus

from modal_eval.checkpoints.s3_objects import Access, Address, UnreachableError, one_line, open_client
from modal_eval.checkpoints.watching.memory import File
from modal_eval.errors import CheckpointError

logger = logging.getLogger(__name__)

LONGEST_POLL_S = 20
"""SQS allows no longer one."""
MESSAGES_AT_A_TIME = 10
REGION = re.compile(r"//sqs\.([a-z0-9-]+)\.")
AT_MOST = 2000
"""Messages that are taken before what they tell of is looked at."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files right below an address, as a listing tells them, and S3's own clock."""

    files: dict[str, File]
    written_at: datetime
    """When the newest file was written."""
    asked_at: datetime

    @property
    def age_s(self) -> float:
        return (self.asked_at - self.written_at).total_seconds()


def list_folder(client: Any, address: Address) -> Listing | None:
    """`None` where nothing is."""
    return list_folders(client, address, delimiter="/").get(address)


def list_folders(client: Any, address: Address, *, delimiter: str = "") -> dict[Address, Listing]:
    """Every folder at or below `address` that has files, in one pass."""
    prefix = f"{address.prefix}/" if address.prefix else ""
    files: dict[Address, dict[str, File]] = {}
    written: dict[Address, datetime] = {}
    asked_at = None
    with one_line(address):
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=address.bucket, Prefix=prefix, Delimiter=delimiter
        )
        for page in pages:
            asked_at = asked_at or parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for entry in page.get("Contents", []):
                folder, _, name = entry["Key"].rpartition("/")
                if not name:
                    continue  # some tools leave an empty object for the folder itself
                where = Address(address.bucket, folder)
                files.setdefault(where, {})[name] = File(int(entry["Size"]), entry["ETag"].strip('"'))
                written[where] = max(written.get(where, entry["LastModified"]), entry["LastModified"])
    if asked_at is None:
        return {}
    return {where: Listing(files[where], written[where], asked_at) for where in files}


class Queue:
    """An SQS queue of S3's notifications, straight from S3, by SNS, or by EventBridge. It belongs to the watch alone."""

    def __init__(self, url: str, access: Access | None = None) -> None:
        access = access or Access()
        found = REGION.search(url)
        region = access.region or (found[1] if found else os.environ.get("AWS_REGION"))  # boto3 reads another variable
        with _one_line(url):
            self.client = open_client("sqs", replace(access, region=region))
        self._url = url

    def batches(self, wait_s: float) -> Iterator[tuple[set[Address], list[str]]]:
        """(folders of new objects, receipts) until the queue is empty; `delete` what has been noted.

        Waits up to `wait_s` for the first message. What is no notification stays in the queue, for its owner or its
        dead-letter queue. Raises `CheckpointError` in one line.
        """
        strangers = taken = 0
        wait = min(int(wait_s), LONGEST_POLL_S)
        while taken < AT_MOST and (messages := self._receive(wait)):
            taken += len(messages)
            wait = 0
            folders: set[Address] = set()
            receipts = []
            for message in messages:
                try:
                    folders |= folders_of(message["Body"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    strangers += 1
                else:
                    receipts.append(message["ReceiptHandle"])
            yield folders, receipts
        if strangers:
            logger.warning("%d messages of the queue are no notifications of S3; they stay in it", strangers)

    def _receive(self, wait_s: int) -> list[dict[str, Any]]:
        with _one_line(self._url):
            found = self.client.receive_message(
                QueueUrl=self._url, MaxNumberOfMessages=MESSAGES_AT_A_TIME, WaitTimeSeconds=wait_s
            )
        return list(found.get("Messages", []))

    def delete(self, receipts: list[str]) -> None:
        """Only once everything that the messages say is remembered elsewhere."""
        if not receipts:
            return
        entries = [{"Id": str(number), "ReceiptHandle": receipt} for number, receipt in enumerate(receipts)]
        with _one_line(self._url):
            self.client.delete_message_batch(QueueUrl=self._url, Entries=entries)


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    from botocore import exceptions as boto

    name = url.rpartition("/")[2]
    try:
        yield
    except boto.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "an error")
        raise CheckpointError(
            f"SQS answered {code} for queue {name}; check its URL and region, and that the credentials have "
            "sqs:ReceiveMessage and sqs:DeleteMessage"
        ) from error
    except (boto.HTTPClientError, boto.ConnectionError) as error:
        raise UnreachableError(f"SQS cannot be reached for queue {name} ({type(error).__name__})") from error
    except (boto.BotoCoreError, ValueError) as error:  # an endpoint that is no URL is a plain ValueError
        raise CheckpointError(
            f"SQS cannot be asked for queue {name} ({type(error).__name__}); check the AWS settings of this machine"
        ) from error


def folders_of(body: str) -> set[Address]:
    """The folders in which a notification says that objects were made. Raises for anything else than a notification."""
    told = json.loads(body)
    if told.get("Event") == "s3:TestEvent":
        return set()
    if told.get("Type") == "Notification":  # by SNS
        return folders_of(told["Message"])
    if "detail-type" in told:  # by EventBridge, which does not quote keys
        made = told["detail-type"] == "Object Created"
        detail = told["detail"]
        return {_folder(detail["bucket"]["name"], detail["object"]["key"])} if made else set()
    return {
        _folder(record["s3"]["bucket"]["name"], unquote_plus(record["s3"]["object"]["key"]))
        for record in told["Records"]
        if record["eventName"].removeprefix("s3:").startswith("ObjectCreated:")
    }


def _folder(bucket: str, key: str) -> Address:
    return Address(bucket, key.rpartition("/")[0])
