"""A real server with S3's notifications and SQS on loopback (moto): one bucket, one queue that hears of every object."""

from __future__ import annotations

import contextlib
import random
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from boto3 import client as boto3_client

from modal_eval.processes import OwnedProcess, free_port
from tests.support.checkpoints import checkpoint
from tests.support.s3 import KEYS, settings

START_TIMEOUT_S = 120.0


@dataclass
class Aws:
    url: str
    bucket: str = field(default_factory=lambda: f"checkpoints-{uuid.uuid4().hex[:8]}")

    @property
    def env(self) -> dict[str, str]:
        """Environment in which boto3 finds this server and nothing of the machine's."""
        return settings(self.url)

    def client(self, service: str = "s3") -> Any:
        return boto3_client(
            service, endpoint_url=self.url, region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip

    def fresh(self, *, queue: bool = False) -> tuple[Aws, str | None]:
        """A bucket of a test's own, and the URL of a queue that hears of every object in it."""
        made = Aws(self.url)
        s3 = made.client()
        s3.create_bucket(Bucket=made.bucket)
        if not queue:
            return made, None
        sqs = made.client("sqs")
        url = sqs.create_queue(QueueName=made.bucket, Attributes={"VisibilityTimeout": "1"})["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        told = {"QueueConfigurations": [{"QueueArn": arn, "Events": ["s3:ObjectCreated:*"]}]}
        s3.put_bucket_notification_configuration(Bucket=made.bucket, NotificationConfiguration=told)
        return made, url

    def take_all(self, queue_url: str) -> list[str]:
        """Bodies of all messages, which are deleted."""
        sqs, bodies = self.client("sqs"), []
        while messages := sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10).get("Messages"):
            for message in messages:
                bodies.append(message["Body"])
                sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
        return bodies

    def is_empty(self, queue_url: str) -> bool:
        """Whether no message is in the queue, not even one that a reader has taken."""
        found = self.client("sqs").get_queue_attributes(QueueUrl=queue_url, AttributeNames=["All"])["Attributes"]
        return not any(int(count) for name, count in found.items() if name.startswith("ApproximateNumberOf"))

    def put(self, prefix: str, files: dict[str, bytes], order: Sequence[str] | None = None) -> None:
        s3 = self.client()
        for name in order or files:
            s3.put_object(Bucket=self.bucket, Key=f"{prefix}/{name}", Body=files[name])


def random_order(files: dict[str, bytes], seed: int) -> list[str]:
    names = sorted(files)
    random.Random(seed).shuffle(names)
    return names


def two_shards() -> dict[str, bytes]:
    """A checkpoint of two shards with an index."""
    return checkpoint({"model-00001-of-00002.safetensors": ("a", "b"), "model-00002-of-00002.safetensors": ("c",)})


@contextlib.contextmanager
def aws_server(folder: Path) -> Iterator[Aws]:
    """The server; what it holds is gone after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "moto.log"
    for _ in range(3):  # a port that was free may be somebody else's by the time it is asked for
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with OwnedProcess.start(command, log_path=log) as process:
            url = f"http://127.0.0.1:{port}"
            if _ready(url, process):
                yield Aws(url)
                return
    raise AssertionError(f"moto did not start in 3 tries:\n{log.read_text()[-3000:]}")


def _ready(url: str, process: OwnedProcess) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/moto-api/data.json", timeout=5)
            return True
        time.sleep(0.05)
    return False
