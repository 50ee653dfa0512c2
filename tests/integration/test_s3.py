"""Checkpoints from a real S3 server: whole, once, resumed in the middle of a file, checked."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modal_eval.checkpoints import resolve_model, use
from modal_eval.checkpoints.s3 import fetch
from modal_eval.checkpoints.s3_checksums import damage, joined, running, wanted_checksum
from modal_eval.checkpoints.s3_objects import Address, look, open_client, part_sizes
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.errors import CheckpointError, IncompleteError
from tests.support.checkpoints import INDEX, checkpoint, index_of, shard
from tests.support.s3 import BUCKET, KEYS, NO_RIGHTS, relay, s3_server, settings

PART = 8 << 20
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FETCH = """if True:
    import logging, sys
    logging.basicConfig(level=logging.INFO)
    from modal_eval.checkpoints.s3 import fetch
    found = fetch(sys.argv[1], "folder", part_bytes=int(sys.argv[2]))
    print(found.size, found.path)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as running_server:
        yield running_server


@pytest.fixture
def seen(server, tmp_path, monkeypatch):
    """The relay in front of the server, which is what boto3 finds in this test."""
    with relay(server) as between:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings(between.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MODAL_EVAL_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("MODAL_EVAL_CACHE_MIN_FREE_GB", "0.1")
        yield between


@pytest.fixture
def put(server, request):
    """Puts a checkpoint under a prefix of the test's own and returns its address."""
    client = server.client()

    def upload(files, name="run_step40", **extra):
        prefix = f"{request.node.name}/{name}"
        for file, content in files.items():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file}", Body=content, **extra)
        return f"s3://{BUCKET}/{prefix}"

    return upload


def two_shards(size=4 << 20):
    return checkpoint({FIRST: ("a", "b"), SECOND: ("c",)}, size=size)


def content_of(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if not file.name.startswith(".")}


def start_fetch(address, part=PART):
    command = [sys.executable, "-c", FETCH, address, str(part)]
    return subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    size, _, path = out.strip().partition(" ")
    return int(size), Path(path)


def cache_folders(tmp_path):
    return [path for path in (tmp_path / "cache" / "checkpoints").iterdir() if len(path.name) == 64]


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_checkpoint_arrives_as_it_is_on_s3_and_nothing_is_fetched_twice(put, seen, slash):
    files = two_shards()
    address = put({**files, "evals/results.json": b"of no use", "optimizer.pt": b"of no use"})
    found = fetch(address + slash, "folder", part_bytes=PART)
    assert content_of(found.path) == files
    assert (found.name, found.size) == ("run_step40", sum(map(len, files.values())))
    asked = len(seen.asked)
    assert fetch(address, "folder", part_bytes=PART).size == 0
    assert len(seen.asked) == asked


def test_the_same_prefix_with_other_content_is_another_model_and_the_same_content_elsewhere_is_not(put, seen):
    files = two_shards(size=1000)
    first = fetch(put(files), "folder")
    elsewhere = fetch(put(files, name="copy"), "folder")
    assert (elsewhere.revision, elsewhere.path, elsewhere.size) == (first.revision, first.path, 0)
    second = fetch(put({**files, SECOND: shard("c", size=1000)}), "folder")
    assert second.revision != first.revision
    assert second.path != first.path


def test_a_fetch_that_was_killed_in_the_middle_of_a_file_fetches_no_finished_part_again(put, seen, tmp_path):
    files = checkpoint({FIRST: ("a", "b"), SECOND: ("c", "d")}, size=32 << 20)
    address = put(files)
    total = sum(map(len, files.values()))
    seen.stop_after = 72 << 20
    process = start_fetch(address)
    assert seen.stopped.wait(120)
    process.kill()
    process.communicate()
    (unfinished,) = (tmp_path / "cache" / "checkpoints" / "unfinished").iterdir()
    lines = {name: (unfinished / f"{name}.parts").read_text().splitlines()[1:] for name in (FIRST, SECOND)}
    noted = {(name, int(line.split()[0]) * PART) for name, noted_parts in lines.items() for line in noted_parts}
    assert noted
    assert cache_folders(tmp_path) == []
    seen.stop_after = None
    seen.asked.clear()
    size, path = ended(start_fetch(address))
    assert content_of(path) == files
    again = {(name, start) for name in (FIRST, SECOND) for start, _ in seen.ranges(name)}
    assert noted.isdisjoint(again)
    # A call of the killed process may reach the relay only now: it asks for a part that the second one asks for too.
    assert size == sum(end - start for _, start, end in set(seen.asked)) <= total - len(noted) * PART + 2 * PART


def test_three_runs_at_once_fetch_once(put, seen):
    files = two_shards(size=16 << 20)
    address = put(files)
    processes = [start_fetch(address) for _ in range(3)]
    results = [ended(process) for process in processes]
    total = sum(map(len, files.values()))
    assert sorted(size for size, _ in results) == [0, 0, total]
    assert seen.bytes_asked() == total
    assert len({path for _, path in results}) == 1
    assert content_of(results[0][1]) == files


def test_a_part_that_arrives_damaged_is_noticed_and_fetched_again(put, seen, caplog):
    files = two_shards()
    address = put(files)
    seen.corrupt[FIRST, 0] = 1
    found = fetch(address, "folder", part_bytes=PART)
    assert content_of(found.path) == files
    assert f"{FIRST} of {address} arrived damaged" in caplog.text


def test_a_file_that_arrives_damaged_twice_is_never_used(put, seen, tmp_path):
    address = put(two_shards())
    seen.corrupt[FIRST, 0] = 2
    with pytest.raises(CheckpointError, match=f"{FIRST} of {address} arrived damaged twice"):
        fetch(address, "folder", part_bytes=PART)
    assert cache_folders(tmp_path) == []


def test_a_connection_that_breaks_in_the_middle_is_taken_up_where_it_broke(put, seen):
    files = two_shards()
    address = put(files)
    seen.cut[SECOND, 0] = 1
    assert content_of(fetch(address, "folder", part_bytes=PART).path) == files
    starts = [start for start, _ in seen.ranges(SECOND)]
    assert len(starts) == 2
    assert starts[1] > 0


def test_an_object_that_changes_while_it_is_fetched_is_noticed(put, seen, tmp_path):
    files = two_shards(size=24 << 20)
    address = put(files)
    seen.stop_after = 4 << 20
    process = start_fetch(address, part=1 << 20)
    assert seen.stopped.wait(60)
    put({SECOND: shard("c", size=24 << 20), FIRST: shard("a", "b", size=24 << 20)})
    seen.stop_after = None
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "changed while it was fetched, so it is still being written" in err
    assert cache_folders(tmp_path) == []


def test_a_checkpoint_that_lacks_a_shard_is_incomplete_before_any_weights_are_fetched(put, seen):
    files = two_shards()
    del files[SECOND]
    address = put(files)
    with pytest.raises(IncompleteError, match=f"{address} is incomplete: it lacks {SECOND}, named by {INDEX}"):
        fetch(address, "folder")
    assert seen.ranges(".safetensors") == []


UPLOADS = [("CRC32", 1), ("CRC32", 3), ("CRC32C", 1), ("CRC32C", 3), ("CRC64NVME", 1), ("CRC64NVME", 3), ("SHA1", 3),
           ("SHA256", 1), ("SHA256", 3), (None, 1), (None, 3)]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "parts"), UPLOADS)
def test_each_checksum_that_s3_keeps_finds_one_wrong_bit(server, seen, tmp_path, algorithm, parts):
    content = os.urandom((11 << 20 if parts > 1 else 0) + 12345)
    client = server.client(request_checksum_calculation="when_required")
    key = f"checksums/{algorithm}-{parts}/model.gguf"
    upload(client, key, content, algorithm, parts)
    address = Address(BUCKET, key)
    (one,) = look(open_client(), address, "gguf").objects
    wanted = wanted_checksum(one)
    assert (wanted.algorithm, one.size) == (algorithm or "MD5", len(content))
    assert wanted.of_parts == (parts > 1 and algorithm != "CRC64NVME")

    def sizes(exactly):
        return part_sizes(open_client(), address, one, exactly=exactly)

    file = tmp_path / "file"
    file.write_bytes(content)
    assert damage(file, one, sizes) is None
    file.write_bytes(content[:7000] + bytes([content[7000] ^ 1]) + content[7001:])
    assert damage(file, one, sizes).startswith(wanted.algorithm)
    file.write_bytes(content[:-1])
    assert "bytes" in damage(file, one, sizes)


def upload(client, key, content, algorithm, parts, first=6 << 20):
    extra = {"ChecksumAlgorithm": algorithm} if algorithm else {}
    if parts == 1:
        client.put_object(Bucket=BUCKET, Key=key, Body=content, **extra)
        return
    whole = {"ChecksumType": "FULL_OBJECT"} if algorithm == "CRC64NVME" else {}
    begun = client.create_multipart_upload(Bucket=BUCKET, Key=key, **extra, **whole)
    done = []
    sizes = [first, 5 << 20, len(content)]  # by default unequal, as S3 allows
    for number in range(1, parts + 1):
        piece, content = content[: sizes[number - 1]], content[sizes[number - 1] :]
        answer = client.upload_part(
            Bucket=BUCKET, Key=key, UploadId=begun["UploadId"], PartNumber=number, Body=piece, **extra
        )
        checksum = {f"Checksum{algorithm}": answer[f"Checksum{algorithm}"]} if algorithm else {}
        done.append({"PartNumber": number, "ETag": answer["ETag"], **checksum})
    client.complete_multipart_upload(
        Bucket=BUCKET, Key=key, UploadId=begun["UploadId"], MultipartUpload={"Parts": done}, **whole
    )


def test_our_checksums_have_the_check_values_of_their_catalogue():
    values = {"CRC32": "cbf43926", "CRC32C": "e3069283", "CRC64NVME": "ae8b14860a799888"}
    for algorithm, value in values.items():
        summed = running(algorithm)
        summed.update(b"1234")
        summed.update(b"56789")
        assert summed.digest().hex() == value


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME"])
def test_the_checksum_of_a_whole_follows_from_those_of_its_pieces(algorithm):
    content = os.urandom(100_000)
    cuts = [0, 1, 777, 65_536, 65_536, 99_999, len(content)]
    pieces = [content[start:end] for start, end in itertools.pairwise(cuts)]
    digests = [digest_over(algorithm, piece) for piece in pieces]
    assert joined(algorithm, digests, [len(piece) for piece in pieces]) == digest_over(algorithm, content)


def digest_over(algorithm, content):
    summed = running(algorithm)
    summed.update(content)
    return summed.digest()


@pytest.mark.parametrize(("algorithm", "parts"), UPLOADS)
def test_an_object_under_each_checksum_arrives_as_it_is_and_a_damaged_one_does_not(server, seen, algorithm, parts):
    content = os.urandom((11 << 20 if parts > 1 else 0) + 123_456)
    key = f"arrives/{algorithm}-{parts}/model.gguf"
    upload(server.client(request_checksum_calculation="when_required"), key, content, algorithm, parts, first=5 << 20)
    seen.corrupt[key, 0] = 1
    found = fetch(f"s3://{BUCKET}/{key}", "gguf", part_bytes=5 << 20)
    assert found.path.read_bytes() == content
    assert found.size == 2 * len(content)  # once damaged, once not


@pytest.mark.parametrize(
    ("environment", "address", "words"),
    [
        ({}, f"s3://{BUCKET}/no/such_step4", "does not exist, or is empty"),
        ({}, "s3://no-such-bucket/x", "bucket no-such-bucket does not exist"),
        ({}, "s3:///x", "names no bucket"),
        ({}, f"s3://{BUCKET}/folders", "holds no model but folders; give one of them: run_step40"),
        ({}, f"s3://{BUCKET}", "has 1 objects and none of a model"),
        (NO_RIGHTS, f"s3://{BUCKET}/x", "no access to s3://models/x"),
        ({**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong-secret-xyz"}, f"s3://{BUCKET}/x", "refused the secret key"),
        ({**KEYS, "AWS_ACCESS_KEY_ID": "nobodys-key-xyz"}, f"s3://{BUCKET}/x", "does not know the access key"),
        ({"AWS_PROFILE": "nobodys"}, f"s3://{BUCKET}/x", "check AWS_PROFILE"),
        (dict.fromkeys(KEYS), f"s3://{BUCKET}/x", "no credentials for s3://models/x; set AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"s3://{BUCKET}/x", "S3 cannot be reached"),
    ],
)
def test_what_s3_refuses_is_said_in_one_line_without_a_key(server, seen, monkeypatch, environment, address, words):
    server.client().put_object(Bucket=BUCKET, Key="folders/run_step40/config.json", Body=b"{}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(CheckpointError, match=words) as caught:
        fetch(address, "folder")
    said = str(caught.value)
    assert "\n" not in said
    assert not [
        value for value in (*KEYS.values(), *filter(None, environment.values())) if "key" in value and value in said
    ]


def test_a_name_that_is_almost_right_is_answered_with_the_right_one(put, seen):
    address = put(two_shards(size=8))
    with pytest.raises(CheckpointError, match="run_step4 does not exist, or is empty; beside it are run_step40"):
        fetch(address[:-1], "folder")


def test_when_s3_is_away_the_copy_of_this_address_is_taken(put, seen, monkeypatch, caplog):
    address = put(two_shards(size=8))
    first = fetch(address, "folder")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert fetch(address, "folder").path == first.path
    assert "taking the copy that was fetched before" in caplog.text
    with pytest.raises(CheckpointError, match="S3 cannot be reached"):
        fetch(f"{address}-other", "folder")


def test_files_that_a_crash_of_the_machine_has_damaged_are_found_after_it(put, seen):
    files = two_shards()
    address = put(files)
    found = fetch(address, "folder", part_bytes=PART)
    (found.path / ".modal-eval-boot").write_text("an earlier boot")
    (found.path / FIRST).write_bytes(
        bytes(len(files[FIRST]))
    )  # what a file system makes of blocks that were never written
    again = fetch(address, "folder", part_bytes=PART)
    assert again.size == len(files[FIRST])
    assert content_of(again.path) == files


def test_room_is_made_by_removing_what_was_used_least_recently_and_never_what_is_in_use(put, seen, monkeypatch):
    old, used, new = (
        put(checkpoint({"model.safetensors": ("a",)}, size=4 << 20), name=name) for name in ("1", "2", "3")
    )
    monkeypatch.setenv("MODAL_EVAL_CACHE_MAX_GB", "0.009")  # two of them
    held = prepared(used)  # the longest ago, and in use: resolving holds it, and the run takes that over
    hold = use(held)
    stale = ended(start_fetch(old))[1]
    newest = ended(start_fetch(new))[1]
    assert (stale.exists(), held.path.exists(), newest.exists()) == (False, True, True)
    monkeypatch.setenv("MODAL_EVAL_CACHE_MAX_GB", "0.005")
    process = start_fetch(old)
    _, err = process.communicate(timeout=60)
    assert "no room for 0.0 GB of checkpoint" in err
    assert held.path.exists()
    hold.close()
    assert ended(start_fetch(old))[1].exists()
    assert not held.path.exists()
    with pytest.raises(CheckpointError, match="is no longer in .*; `modal-eval resume` fetches it again"):
        use(held)


def test_a_disk_that_is_too_full_is_told_with_the_numbers(put, seen, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_CACHE_MIN_FREE_GB", "1000000")
    with pytest.raises(CheckpointError, match=r"no room for .* GB are free and 1000000.0 GB have to stay free"):
        fetch(put(two_shards(size=8)), "folder")


def prepared(address, **infra):
    benchmark = BenchmarkConfig(name="toy", env_id="toy")
    return resolve_model(resolve(address, benchmark, Overrides(infra=infra)))


def test_a_model_on_s3_is_repaired_pinned_and_named_by_its_prefix(put, seen):
    files = checkpoint({"model.safetensors": ("a",)})
    address = put({**files, INDEX: index_of({"a": "model-00001-of-00001.safetensors"})}, name="math_step127120")
    model = prepared(f"{address}/")
    assert (model.source, model.served_name, model.step) == ("s3", "math_step127120", 127120)
    assert model.revision.startswith("sha256:")
    assert json.loads((model.path / INDEX).read_bytes())["weight_map"] == {"a": "model.safetensors"}
    assert (model.chat_template_source, len(model.chat_template_sha256)) == ("tokenizer_config.json", 64)
    use(model).close()


def test_a_gguf_file_on_s3_needs_llamacpp_and_one_choice(put, seen):
    address = put({"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    with pytest.raises(CheckpointError, match="is a GGUF file; add --infra.engine=llamacpp"):
        prepared(f"{address}/a.gguf")
    with pytest.raises(CheckpointError, match="names none .it has a.gguf, b.gguf"):
        prepared(address, engine="llamacpp")


def test_a_real_model_on_s3_is_evaluated_from_the_command_line(server, seen, cli):
    name = "SmolLM2-135M-Instruct"
    packaged = resolve_model(resolve(name, BenchmarkConfig(env_id="toy"), Overrides(infra={"engine": "llamacpp"})))
    server.client().upload_file(str(packaged.path), BUCKET, f"quantized/{name}_step40.gguf")
    cli.env |= settings(seen.url)
    address = f"s3://{BUCKET}/quantized/{name}_step40.gguf"
    limits = ["--eval.num_examples=2", "--sampling.max_tokens=20", "--run-dir", str(cli.run_dir)]
    ran = cli("run", "-m", address, "-b", "demo", "--infra.engine=llamacpp", *limits)
    metadata = json.loads((cli.run_dir / "metadata.json").read_text())
    prepared_model = json.loads((cli.run_dir / "prepared.json").read_text())["model"]
    assert (metadata["num_scored"], metadata["model_step"], metadata["chat_template"]["source"]) == (2, 40, "gguf")
    assert metadata["model_revision"] == prepared_model["revision"]
    assert prepared_model["digest"] == packaged.digest
    written = "".join(file.read_text(errors="replace") for file in cli.run_dir.rglob("*") if file.is_file())
    assert not [value for value in KEYS.values() if value in written + ran.stdout + ran.stderr]
