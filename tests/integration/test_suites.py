"""`modal-eval suite` and `modal-eval batch` on this machine: real processes, a scripted upstream, and the real small model."""

import csv
import json
import signal

import yaml

from tests.support.cli import finished
from tests.support.llamacpp import MODEL
from tests.support.team import write_lines
from tests.support.upstream import upstream

ROWS = [{"question": f"What is {number} plus 1?", "answer": f"It is #### {number + 1}"} for number in range(4)]


def suite_file(cli, entries):
    path = cli.folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"benchmarks": entries}))
    return str(path)


def statuses(cli):
    rows = json.loads((cli.folder / "suite" / "suite.json").read_text())["outcomes"]
    return {name: row["status"] for name, row in rows.items()}


def test_a_suite_ends_its_table_without_the_benchmark_that_fails_and_finishes_it_later(cli, mark):
    data = write_lines(cli.folder / "gsm8k.jsonl", [{"no": "question"}])
    suite = suite_file(cli, ["demo", {"benchmark": "gsm8k", "overrides": {"env": {"data_files": str(data)}}}])
    folder = ["--suite-dir", str(cli.folder / "suite")]
    with upstream(latency=0.2) as server:
        asked = ["-m", "stub", "-s", suite, *folder, f"--infra.base_url={server.base_url}", "--eval.num_examples=4"]
        ended = cli("suite", *asked, expect=1)
        assert statuses(cli) == {"demo": "complete", "gsm8k": "failed"}
        assert "modal-eval: gsm8k: exit 1" in ended.stderr
        posts = server.stats()["posts"]
        write_lines(data, ROWS)
        server.script(default={"latency": 60.0})
        process = cli.start("suite", *asked)
        cli.wait_for(lambda: server.stats()["in_flight"] > 0, process)
        process.send_signal(signal.SIGTERM)
        finished(process, 130)
        assert mark.wait_until_gone(60) == {}
        assert statuses(cli) == {"demo": "complete"}
        server.script(default={"latency": 0.0})
        ended = cli("suite", *asked, "--json")
        assert server.stats()["posts"] >= posts + 4 * len(ROWS)
        assert "demo" not in ended.stderr.replace("demo--", "")  # it was complete, so nothing is told of it
        assert {row["benchmark"]: row["num_scored"] for row in json.loads(ended.stdout)["outcomes"]} == {
            "demo": 4,
            "gsm8k": 16,
        }
    assert "| gsm8k |" in (cli.folder / "suite" / "table.md").read_text()


def test_a_checkpoint_whose_process_fails_shows_its_last_words_and_no_other_checkpoints_scores(cli):
    suite = suite_file(cli, ["demo"])
    jobs = {"exp": "stub", "sound": "stub"}

    def batch(upstream, expect):
        rows = [{"checkpoint_path": path, "output_name": name} for name, path in jobs.items()]
        (cli.folder / "jobs.json").write_text(json.dumps(rows))
        ended = cli(
            "batch", str(cli.folder / "jobs.json"), "-s", suite, "--batch-dir", str(cli.folder / "batch"),
            f"--infra.base_url={upstream.base_url}", "--eval.num_examples=2", expect=expect,
        )  # fmt: skip
        with (cli.folder / "batch" / "table.csv").open() as file:
            return ended, {row["checkpoint"]: row for row in csv.DictReader(file)}

    with upstream() as server:
        _, rows = batch(server, 0)
        assert {name: row["status"] for name, row in rows.items()} == {"exp": "complete", "sound": "complete"}
        jobs["exp"] = "another"
        jobs["blocked"] = "stub"
        (cli.folder / "outputs" / "suites" / "mine--blocked").write_text("no folder")
        ended, rows = batch(server, 1)
    log = cli.folder / "batch" / "jobs" / "exp.log"
    assert (rows["exp"]["status"], rows["exp"]["avg_reward"]) == ("failed", "")
    assert rows["exp"]["error"].startswith(f"exit 2, see {log}: ")
    assert "holds the suite mine of stub, not mine of another" in rows["exp"]["error"]
    assert f"modal-eval: exp: exit 2, see {log}: " in ended.stderr
    assert rows["blocked"]["status"] == "failed"
    assert "blocked.log: " in rows["blocked"]["error"]
    assert (rows["sound"]["status"], rows["sound"]["num_scored"]) == ("complete", "2")
    assert "* **exp**: exit 2" in (cli.folder / "batch" / "table.md").read_text()


def test_a_batch_serves_all_its_checkpoints_benchmarks_from_one_server_and_leaves_none(cli):
    """The run that starts the shared server ends before the others, and may not take it along."""
    for name, examples in (("one", 1), ("two", 4)):
        config = {"env_id": "demo", "infra": {"engine": "llamacpp"}, "vllm": {"max_model_len": 2048}}
        config |= {
            "sampling": {"temperature": 0, "max_tokens": 16},
            "eval": {"num_examples": examples, "max_concurrent": 2},
        }
        (cli.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    suite = suite_file(cli, [str(cli.folder / "one.yaml"), str(cli.folder / "two.yaml")])
    jobs = [{"checkpoint_path": MODEL, "output_name": f"exp step{number}"} for number in (1, 2)]
    (cli.folder / "jobs.json").write_text(json.dumps(jobs))
    cli("batch", str(cli.folder / "jobs.json"), "-s", suite, "--batch-dir", str(cli.folder / "batch"))
    with (cli.folder / "batch" / "table.csv").open() as file:
        rows = [(row["checkpoint"], row["benchmark"], row["status"], row["num_scored"]) for row in csv.DictReader(file)]
    assert rows == [
        (f"exp step{number}", name, "complete", count)
        for number in (1, 2)
        for name, count in (("one", "1"), ("two", "4"))
    ]
    logs = [path.read_text() for path in (cli.folder / "outputs").rglob("flow.log")]
    assert sum(text.count("under a keeper of its own") for text in logs) == 1
    assert sum("is running already and is shared" in text for text in logs) == 3
    assert list((cli.folder / "state" / "leases").iterdir()) == []
