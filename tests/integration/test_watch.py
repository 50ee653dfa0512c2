"""New checkpoints on a real S3 server with SQS: each content is announced once, whatever dies and whatever comes twice."""

import io
import itertools
import json
import logging
import multiprocessing
import os
import signal

import pytest
from botocore.awsrequest import AWSResponse
from urllib3 import HTTPResponse

from modal_eval.checkpoints.s3_objects import Access, Address, client_for, open_client
from modal_eval.checkpoints.watching import Memory, Watcher
from modal_eval.checkpoints.watching.sources import Queue
from modal_eval.errors import CheckpointError, ServerError
from tests.support.aws import aws_server, random_order, two_shards
from tests.support.checkpoints import INDEX, checkpoint, index_of
from tests.support.processes import until

FORK = multiprocessing.get_context("fork")
EVERY = 12
"""Of the moments at which a look may be killed, so many make one try; those around the announcement are all tried."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with aws_server(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture
def aws(server, monkeypatch):
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


class Heard:
    """Whoever hears announcements: writes each down, so that it survives the process that sent it."""

    def __init__(self, path):
        self.path = path

    def __call__(self, announcement, maybe_sent):
        with self.path.open("a") as file:
            file.write(json.dumps([announcement.id, announcement.describe()]) + "\n")

    def sent(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []

    def events(self):
        """What Prefect makes of it: one event an id."""
        return list(dict(self.sent()).values())


@pytest.fixture
def heard(tmp_path):
    return Heard(tmp_path / "heard")


def watcher(bucket, memory, heard, queue_url=None, **settings):
    client = open_client()
    queue = Queue(queue_url) if queue_url else None
    return Watcher(
        client, Address(bucket, "runs"), Memory.at(str(memory), client), heard, queue, **{"settle_s": 0, **settings}
    )


def look_and_die(made, step, moments):
    """Look, and `kill -9` oneself at the moment number `step`; there is one around each request and each announcement."""
    count = itertools.count()

    def moment(what):
        number = next(count)
        moments.append((number, what))
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    for client in (made.client, *([made.queue.client] if made.queue else [])):
        client.meta.events.register("before-send", lambda **_: moment("request"))
        client.meta.events.register("after-call", lambda **_: moment("answer"))
    tell = made.announce

    def announce(*told):
        moment("announce")
        tell(*told)
        moment("announced")

    made.announce = announce
    made.look()
    return moments


@pytest.mark.parametrize(
    ("where", "queued"), [("folder", False), ("folder", True), ("s3", False)], ids=["listing", "queue", "memory on s3"]
)
def test_a_look_killed_at_any_moment_leaves_exactly_one_event(aws, tmp_path, where, queued):
    mine, url = aws.fresh(queue=queued)
    mine.put("runs/job/math_step40", two_shards())
    sqs = mine.client("sqs")
    told = mine.take_all(url) if queued else []

    def setting(name):
        """A watch that remembers nothing yet, before a queue that tells everything again."""
        for body in told:
            sqs.send_message(QueueUrl=url, MessageBody=body)
        memory = tmp_path / name / "memory" if where == "folder" else f"s3://{mine.bucket}/memory/{name}"
        (tmp_path / name).mkdir()
        heard = Heard(tmp_path / name / "heard")
        return lambda: watcher(mine.bucket, memory, heard, url), heard

    make, heard = setting("alive")
    moments = look_and_die(make(), None, [])
    assert len(heard.events()) == 1
    steps = {number for number, what in moments if what.startswith("announce")} | set(range(0, len(moments), EVERY))
    for step in sorted(steps):
        make, heard = setting(f"killed-{step}")
        child = FORK.Process(target=look_and_die, args=(make(), step, []))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        after = make()
        until(
            lambda after=after, heard=heard: (
                after.look() is not None and heard.sent() and (not url or mine.is_empty(url))
            )
        )
        after.look()
        assert len(heard.events()) == 1, f"killed at moment {step} of {len(moments)}: {heard.sent()}"
    assert heard.events()[0] | {"revision": ""} == {
        "bucket": mine.bucket, "prefix": "runs/job/math_step40", "run": "math", "step": 40, "stage": None, "revision": "",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_files_in_any_order_are_announced_with_the_last_that_is_needed_and_never_again(aws, tmp_path, heard, seed):
    mine, _ = aws.fresh()
    files = two_shards()
    made = watcher(mine.bucket, tmp_path / "memory", heard)
    for _again in range(2):
        for name in random_order(files, seed):
            mine.put("runs/math_final", {name: files[name]})
            made.look()
    assert [event["stage"] for event in heard.events()] == ["final"]
    assert len(heard.sent()) == 1
    made.client.put_object(Bucket=mine.bucket, Key="runs/math_final/config.json", Body=b'{"other": 1}')
    made.look()
    assert len(heard.sent()) == 2, "another content under the same name is another checkpoint"


def test_what_an_engine_could_not_load_is_waited_for_with_the_reason_and_what_can_be_repaired_is_announced(
    aws, tmp_path, heard
):
    mine, _ = aws.fresh()
    whole = checkpoint({"model.safetensors": ("a", "b")})
    cut = {**whole, "model.safetensors": whole["model.safetensors"][:-1]}
    lacking = {
        **two_shards(),
        INDEX: index_of({"a": "model-00001-of-00002.safetensors", "z": "model-00002-of-00002.safetensors"}),
    }
    misnamed = {**whole, INDEX: index_of(dict.fromkeys("ab", "model-00001-of-00001.safetensors"))}
    for name, files in {"cut_step1": cut, "lacking_step2": lacking, "misnamed_step3": misnamed}.items():
        mine.put(f"runs/{name}", files)
    mine.put("runs/misnamed_step3/evals", {"results.json": b"{}"})
    made = watcher(mine.bucket, tmp_path / "memory", heard)
    assert made.look() == {"waiting": 2, "announced": 1}
    assert [event["prefix"] for event in heard.events()] == ["runs/misnamed_step3"]
    why = {name: made.look_at(Address(mine.bucket, f"runs/{name}")).why for name in ("cut_step1", "lacking_step2")}
    assert "it was not copied whole" in why["cut_step1"]
    assert "lacks z" in why["lacking_step2"]
    mine.put("runs/cut_step1", whole)
    assert made.look() == {"waiting": 1, "announced": 1, "known": 1}


def test_a_checkpoint_settles_before_it_is_announced_and_an_old_one_is_left_alone(aws, tmp_path, heard, caplog):
    mine, _ = aws.fresh()
    mine.put("runs/math_step40", two_shards())
    assert watcher(mine.bucket, tmp_path / "memory", heard, settle_s=3600).look() == {"waiting": 1}
    until(
        lambda: watcher(mine.bucket, tmp_path / "other", heard, settle_s=3600, max_age_s=0.5).look() == {"too old": 1}
    )
    assert heard.sent() == []
    assert watcher(mine.bucket, tmp_path / "memory", heard, max_age_s=0.5).look() == {"too old": 1}
    assert "is not announced; it was last still being written" in caplog.text
    assert watcher(mine.bucket, tmp_path / "memory", heard).look() == {"announced": 1}


def test_an_announcement_that_nobody_took_is_made_again_and_said_to_be_the_same(aws, tmp_path, heard):
    mine, _ = aws.fresh()
    mine.put("runs/math_step40", two_shards())
    tried = []

    def away(announcement, maybe_sent):
        tried.append((announcement.id, maybe_sent))
        raise ServerError("away")

    made = watcher(mine.bucket, tmp_path / "memory", away)
    for _ in range(2):
        with pytest.raises(ServerError):
            made.look()
    assert tried == [(tried[0][0], False), (tried[0][0], True)]
    made.client.delete_object(Bucket=mine.bucket, Key="runs/math_step40/config.json")
    assert watcher(mine.bucket, tmp_path / "memory", heard).look()["announced"] == 0
    assert [told[0] for told in heard.sent()] == [tried[0][0]]


def test_two_watches_on_one_memory_announce_once_and_the_slower_one_is_told_to_look_again(aws, heard):
    mine, _ = aws.fresh()
    mine.put("runs/math_step40", two_shards())
    memory = f"s3://{mine.bucket}/memory"
    first = watcher(mine.bucket, memory, heard)
    second = watcher(mine.bucket, memory, lambda *told: (first.look(), heard(*told)))
    first.memory.open_addresses()
    with pytest.raises(CheckpointError, match="was changed by another watch"):
        second.look()
    assert second.look() == {"known": 1}
    assert len(heard.events()) == 1


def test_a_broken_record_is_named_and_holds_up_no_other_address(aws, tmp_path, heard):
    mine, _ = aws.fresh()
    mine.put("runs/a_step1", two_shards())
    watcher(mine.bucket, tmp_path / "memory", heard).look()
    (record,) = (tmp_path / "memory" / "known").iterdir()
    record.write_text("{")
    mine.put("runs/b_step2", two_shards())
    with pytest.raises(CheckpointError, match=f"known/{record.name} in the watch's memory is broken"):
        watcher(mine.bucket, tmp_path / "memory", heard).look()
    assert [event["run"] for event in heard.events()] == ["a", "b"]


def refuse(client, operation, status, code=""):
    """Have S3 answer this operation so, until what is returned is called."""
    event, body = f"before-send.s3.{operation}", f"<Error><Code>{code}</Code></Error>" if code else ""

    def answer(request, **_):
        return AWSResponse(request.url, status, {}, HTTPResponse(io.BytesIO(body.encode()), preload_content=False))

    client.meta.events.register(event, answer)
    return lambda: client.meta.events.unregister(event, answer)


@pytest.mark.parametrize(
    ("operation", "status", "code", "words"),
    [
        ("HeadObject", 403, "", "no access to"),
        ("GetObject", 400, "ExpiredToken", "have expired; log in again"),
        ("GetObject", 400, "KMS.DisabledException", "S3 answered KMS.DisabledException"),
    ],
)
def test_a_checkpoint_that_s3_refused_is_announced_once_s3_gives_it_though_its_listing_is_the_same(
    aws, tmp_path, heard, caplog, operation, status, code, words
):
    mine, _ = aws.fresh()
    mine.put("runs/math_step40", two_shards())
    made = watcher(mine.bucket, tmp_path / "memory", heard)
    give = refuse(made.client, operation, status, code)
    assert [made.look(), made.look()] == [{"waiting": 1}] * 2
    give()
    assert made.look() == {"announced": 1}
    assert caplog.text.count(words) == 1


def test_a_second_look_at_what_is_waited_for_reaches_the_addresses_behind_a_broken_one(aws, tmp_path, heard):
    mine, _ = aws.fresh()
    files = two_shards()
    names = [f"runs/math_step{number}" for number in range(4)]
    for name in names:
        mine.put(name, {"config.json": files["config.json"]})
    made = watcher(mine.bucket, tmp_path / "memory", heard)
    assert made.look() == {"waiting": 4}
    broken = made.memory.open_addresses()[0]
    (record,) = [file for file in (tmp_path / "memory" / "known").iterdir() if f'"{broken}"' in file.read_text()]
    record.write_text("{")
    for name in names:
        mine.put(name, files)
    with pytest.raises(CheckpointError, match=f"known/{record.name} in the watch's memory is broken"):
        made.look_at_open()
    assert {event["prefix"] for event in heard.events()} == {*names} - {broken.prefix}


def test_notifications_by_every_way_are_understood_and_strangers_stay_in_the_queue(aws, tmp_path, heard, caplog):
    mine, url = aws.fresh(queue=True)
    mine.put("runs/a b+c_step1", two_shards())
    direct = next(body for body in mine.take_all(url) if "config.json" in body)
    by_sns = json.dumps({"Type": "Notification", "Message": direct.replace("a+b%2Bc_step1", "by_sns")})
    bridge = {
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": mine.bucket}, "object": {"key": "runs/100%25 bridge_step2/config.json"}},
    }
    mine.put("runs/by_sns", two_shards())
    mine.put("runs/100%25 bridge_step2", two_shards())
    mine.take_all(url)
    for body in (direct, by_sns, json.dumps(bridge), "no JSON", json.dumps({"Records": 5})):
        mine.client("sqs").send_message(QueueUrl=url, MessageBody=body)
    with caplog.at_level(logging.WARNING):
        assert watcher(mine.bucket, tmp_path / "memory", heard, url).look() == {"announced": 3}
    assert {event["run"] for event in heard.events()} == {"a b+c", "by_sns", "100%25 bridge"}
    assert "2 messages of the queue are no notifications" in caplog.text
    until(lambda: sorted(mine.take_all(url)) == sorted(["no JSON", json.dumps({"Records": 5})]))


@pytest.mark.parametrize(
    ("url", "region", "words"),
    [
        ("https://sqs.eu-central-1.amazonaws.com/1/none", None, "SQS answered .* for queue none; check its URL"),
        ("http://127.0.0.1:9/1/none", "us-east-1", "SQS cannot be reached for queue none"),
        ("http://127.0.0.1:9/1/none", None, "SQS cannot be asked for queue none"),
    ],
)
def test_what_a_queue_refuses_is_said_in_one_line(aws, monkeypatch, url, region, words):
    monkeypatch.delenv("AWS_REGION")
    if region:
        monkeypatch.setenv("AWS_REGION", region)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=words) as caught:
        list(Queue(url).batches(0))
    assert "\n" not in str(caught.value)


def test_an_endpoint_of_queues_that_is_no_url_is_said_in_one_line(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "localhost:9")
    with pytest.raises(
        CheckpointError, match="SQS cannot be asked for queue none .ValueError.; check the AWS settings"
    ):
        Queue("http://127.0.0.1:9/1/none")


def test_a_profile_of_a_block_that_this_machine_lacks_is_no_fault_to_try_again():
    with pytest.raises(CheckpointError, match=r"ProfileNotFound.*what the block gives") as caught:
        client_for(Address("checkpoints", "runs"), Access(profile="nobodys"))
    assert not caught.value.retryable
