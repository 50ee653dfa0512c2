"""What a team does with a Prefect server: set it up, deploy everything, ask for runs, retry them on another node."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import yaml

from modal_eval.config.load import benchmark_files
from modal_eval.config.suites import suite_files
from tests.support.cli import repeated
from tests.support.hub import serve_hub
from tests.support.modal_account import COMMIT, FILES, MODEL, account_with_vllm
from tests.support.processes import until
from tests.support.team import ENDED, ROOT, installed, write_lines
from tests.support.upstream import upstream

PROBLEMS = [{"question": f"What is {number} times 2?", "answer": "14"} for number in range(8)]
SUMS = [{"question": f"What is {number} plus 1?", "answer": f"It is #### {number + 1}"} for number in range(4)]
RIGHT, WRONG = "It is \\boxed{14}.", "It is \\boxed{15}."


@pytest.fixture(scope="module", name="team")
def installation(tmp_path_factory, prefect_api):
    with installed(tmp_path_factory.mktemp("team"), prefect_api) as team:
        yield team


def endpoint(server, **more):
    return {"target": "endpoint", "overrides": {"infra": {"base_url": server.base_url}, **more}}


def test_everything_of_the_checkout_is_deployed_and_a_second_init_changes_nothing(team):
    flows = {one["id"]: one["name"] for one in team.post("flows/filter", {})}
    ours = {"deployments": {"tags": {"all_": ["modal-eval"]}}}
    there = {f"{flows[one['flow_id']]}/{one['name']}": one for one in team.post("deployments/filter", ours)}
    assert {f"eval/{name}" for name in benchmark_files()} <= set(there)
    assert {f"suite/{name}" for name in suite_files()} <= set(there)
    assert {"nightly/regression", "watch/checkpoints", "janitor/servers", "eval/on-modal"} <= set(there)
    assert [one["schedule"]["timezone"] for one in there["nightly/regression"]["schedules"]] == ["America/Los_Angeles"]
    form = there["eval/demo"]["parameter_openapi_schema"]["properties"]
    assert all(field.get("description") for field in form.values())

    def seen():
        pools = {one["name"]: one["id"] for one in team.post("work_pools/filter", {})}
        queues = {
            (pool, one["name"]): (one["id"], one["priority"])
            for pool in ("modal", "a100")
            for one in team.post(f"work_pools/{pool}/queues/filter", {})
        }
        return pools, queues, {one["name"]: one["id"] for one in team.post("automations/filter", {})}

    before = seen()
    assert {key: priority for key, (_, priority) in before[1].items() if key[0] == "a100"} == {
        ("a100", "high"): 1, ("a100", "default"): 2, ("a100", "nightly"): 3,
    }  # fmt: skip
    assert before[1]["modal", "suites"][1] == 4
    automations = {"crash runs without a heartbeat", "put back runs that never began", "full suite on a new checkpoint"}
    assert automations <= set(before[2])
    stray = {**{key: there["eval/demo"][key] for key in ("flow_id", "tags", "entrypoint")}, "name": "was-removed"}
    made = team.post("deployments/", stray)
    assert "removed the deployment eval/was-removed" in team.cli("init", "--prune").stderr
    assert seen() == before
    left = {one["id"] for one in team.post("deployments/filter", ours)}
    assert left == {one["id"] for one in there.values()}
    assert made["id"] not in left


def test_a_run_of_a_deployment_is_named_tagged_and_shown_and_a_wrong_parameter_starts_none(team):
    refused = team.prefect(
        "deployment",
        "run",
        "eval/demo",
        "-p",
        "model=stub",
        "-p",
        'overrides={"sampling": {"temperature": 9}}',
        expect=1,
    )
    assert "9 is greater than the maximum of 2" in refused
    secret = 'overrides={"infra": {"base_url": "https://me:sesame@host/v1"}}'
    refused = team.prefect("deployment", "run", "eval/demo", "-p", "model=stub", "-p", secret, expect=1)
    assert "without a user, a password or a query" in " ".join(refused.split())
    assert "sesame" not in refused
    assert "'modle'" in team.prefect("deployment", "run", "eval/demo", "-p", "modle=stub", expect=1)
    with upstream(model="stub_step40") as server, team.worker("a100", "shown"):
        run = team.run("eval/demo", model="stub_step40", num_examples=6, **endpoint(server))
        ended = team.ended(run)
        assert ended["state_type"] == "COMPLETED", team.logs(run)
    assert ended["name"] == "demo·stub@40"
    assert {"benchmark:demo", "model:stub@40", "modal-eval"} <= set(ended["tags"])
    shown = team.artifacts(run)
    assert set(shown) == {"progress-demo", "result-demo", "report-demo", "server-demo"}
    assert shown["progress-demo"]["data"] == 100
    assert server.base_url in shown["server-demo"]["data"]
    assert "reward" in [row["metric"] for row in json.loads(shown["result-demo"]["data"])]
    run_dir = next(team.cli.folder.glob(f"outputs/*/{run.replace('-', '')[-8:]}"))
    assert str(run_dir) in shown["report-demo"]["data"]
    assert json.loads((run_dir / "metadata.json").read_text())["num_scored"] == 6


def test_a_killed_run_is_finished_by_a_retry_on_another_node_and_once_finished_asks_nobody(team):
    with upstream(latency=0.5) as server:
        with team.worker("a100", "first"):
            run = team.run("eval/demo", model="stub", num_examples=30, **endpoint(server, eval={"max_concurrent": 2}))
            server.wait_for_posts(8, timeout=240)
            engine = next(pid for pid, line in team.cli.mark.processes().items() if "prefect.engine" in line)
            team.cli.run_dir = next(team.cli.folder.glob(f"outputs/*/{run.replace('-', '')[-8:]}"))
            os.kill(engine, signal.SIGKILL)
            assert team.ended(run)["state_type"] == "CRASHED"
        until(lambda: server.stats()["in_flight"] == 0)
        in_transit = team.cli.in_transit(server)
        server.script(default={"latency": 0})
        with team.worker("a100", "second"):
            team.retry(run)
            assert team.ended(run)["state_type"] == "COMPLETED", team.logs(run)
            assert repeated(server) <= in_transit
            posts = server.stats()["posts"]
            assert team.tasks(run, 2)["deploy_server"] == "Completed"
            team.retry(run)
            assert team.ended(run)["state_type"] == "COMPLETED"
            assert server.stats()["posts"] == posts
    third = team.tasks(run, 3)
    assert "deploy_server" not in third
    assert (third["prepare"], third["generate"]) == ("Cached", "Cached")


def test_a_nightly_suite_outlives_a_benchmark_that_fails_and_its_gate_names_what_got_worse(team):
    folder = team.cli.folder
    suite = folder / "two.yaml"
    problems, sums = (
        write_lines(folder / "aime.jsonl", PROBLEMS),
        write_lines(folder / "gsm8k.jsonl", [{"no": "question"}]),
    )
    entries = [
        {"benchmark": "aime2025", "overrides": {"env": {"data_files": str(problems)}, "eval": {"rollouts": 1}}},
        {"benchmark": "gsm8k", "overrides": {"env": {"data_files": str(sums)}, "eval": {"rollouts": 1}}},
    ]
    suite.write_text(yaml.safe_dump({"benchmarks": entries}))
    asked = {"model": "stub", "suite": str(suite), "baseline": "nights"}
    queues = ("--queue", "default", "--queue", "suites")
    with upstream(answer=RIGHT) as server, team.worker("a100", "node"), team.worker("modal", "control", *queues):
        night = team.run("nightly/regression", **asked, save_baseline=True, **endpoint(server))
        assert "gsm8k: not complete" in team.ended(night)["state"]["message"]
        children = {one["name"]: one for one in team.flow_runs(f"suite-run:{night.replace('-', '')[-8:]}")}
        assert {name: one["state_type"] for name, one in children.items()} == {
            "aime2025·stub": "COMPLETED", "gsm8k·stub": "FAILED",
        }  # fmt: skip
        write_lines(sums, SUMS)
        posts = server.stats()["posts"]
        team.retry(night)
        assert team.ended(night)["state_type"] == "COMPLETED", team.logs(night)
        assert server.stats()["posts"] == posts + len(SUMS)
        again = {one["name"]: one for one in team.flow_runs(f"suite-run:{night.replace('-', '')[-8:]}")}
        assert {name: one["id"] for name, one in again.items()} == {name: one["id"] for name, one in children.items()}
        assert [again[name]["run_count"] for name in ("aime2025·stub", "gsm8k·stub")] == [1, 2]
        server.script(default={"answer": WRONG})
        worse = team.run("nightly/regression", **asked, overrides={"infra": {"base_url": server.base_url}})
        said = team.ended(worse)["state"]["message"]
        posts = server.stats()["posts"]
        unknown = team.run("nightly/regression", **{**asked, "baseline": "never-saved"}, **endpoint(server))
        assert "never-saved" in team.ended(unknown)["state"]["message"]
        assert server.stats()["posts"] == posts, "a night was paid for that nothing could be compared with"
    assert "stops 1 of 2 benchmarks: aime2025 is worse" in said
    gate = json.loads(team.artifacts(worse)["gate-nights"]["data"])
    assert {row["benchmark"]: (row["difference"], row["verdict"]) for row in gate} == {
        "aime2025": ("-1.000", "worse"), "gsm8k": ("+0.000", "equal"),
    }  # fmt: skip
    (table,) = folder.glob(f"outputs/suites/*/{worse.replace('-', '')[-8:]}/table.md")
    assert "| aime2025 | 0.000" in table.read_text()


def test_a_suite_sends_to_modal_what_no_node_takes_in_time_and_finds_it_there_when_tried_again(team, monkeypatch):
    folder = team.cli.folder
    suite = folder / "overflowing.yaml"
    settings = {"env": {"data_files": str(write_lines(folder / "few.jsonl", PROBLEMS))}, "eval": {"rollouts": 1}}
    suite.write_text(yaml.safe_dump({"benchmarks": [{"benchmark": "aime2025", "overrides": settings}]}))
    asked = {"model": MODEL, "suite": str(suite)}
    infra = {"target": "auto", "gpu_wait": 1, "timeout": 600}
    with (
        serve_hub(COMMIT, {MODEL: FILES}) as hub,
        account_with_vllm(folder / "account", answer=RIGHT) as modal,
        upstream(latency=30) as server,
    ):
        outside = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **modal.variables}
        monkeypatch.setattr(team.cli, "env", team.cli.env | outside)
        with team.worker("a100", "busy", "--limit=1"), team.worker("modal", "beside"):
            long = team.run("eval/demo", model="stub", num_examples=30, **endpoint(server))
            server.wait_for_posts(1, timeout=240)
            whole = team.run("suite/code", **asked, overrides={"infra": infra})
            assert team.ended(whole)["state_type"] == "COMPLETED", team.logs(whole)
            children = team.flow_runs(f"suite-run:{whole.replace('-', '')[-8:]}")
            states = {one["state_type"]: one["parameters"]["target"] for one in children}
            assert states == {"CANCELLED": "auto", "COMPLETED": "modal"}
            team.retry(whole)
            assert team.ended(whole)["state_type"] == "COMPLETED", team.logs(whole)
            assert len(team.flow_runs(f"suite-run:{whole.replace('-', '')[-8:]}")) == 2
            patient = team.run("suite/code", **asked, overrides={"infra": {**infra, "gpu_wait": 600}})
            tag = f"suite-run:{patient.replace('-', '')[-8:]}"
            until(lambda: team.flow_runs(tag), 120)
            (child,) = team.flow_runs(tag)
            team.post(f"flow_runs/{child['id']}/set_state", {"state": {"type": "CANCELLING"}})
            assert "1 of 1 benchmarks failed: aime2025" in team.ended(patient)["state"]["message"]
            assert len(team.flow_runs(tag)) == 1, "what a person has cancelled was started again on Modal"
            server.script(default={"latency": 0})
            team.post(f"flow_runs/{long}/set_state", {"state": {"type": "CANCELLING"}, "force": True})
            assert team.ended(long)["state_type"] in ENDED


def test_a_cancelled_suite_cancels_its_runs_that_go_on_and_no_others(team):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.suite import cancel_runs

    flow = team.post("flows/", {"name": "eval"})["id"]
    suite = SimpleNamespace(id="01a1ff15-7abb-77ab-ae91-51896300c0de", parameters={})

    def child(state, tag="suite-run:6300c0de"):
        return team.post("flow_runs/", {"flow_id": flow, "tags": [tag], "state": {"type": state}})["id"]

    runs = [child("RUNNING"), child("SCHEDULED"), child("COMPLETED"), child("RUNNING", tag="suite-run:another")]
    with temporary_settings({PREFECT_API_URL: team.api}):
        cancel_runs(None, suite, None)
    assert [team.flow_run(run)["state_type"] for run in runs] == ["CANCELLING", "CANCELLED", "COMPLETED", "RUNNING"]


def test_a_watch_without_its_block_says_so_once_and_rests_until_it_is_deployed_again(team):
    def active():
        return [one["active"] for one in team.get("deployments/name/watch/checkpoints")["schedules"]]

    team.prefect("--no-prompt", "deploy", "-n", "watch/checkpoints")
    assert active() == [True]
    with team.worker("modal", "watching"):
        said = team.ended(team.run("watch/checkpoints"))["state"]["message"]
    assert "no Checkpoint Bucket block called 'checkpoints'" in said
    assert "its schedule rests until" in said
    assert active() == [False]
    team.prefect("--no-prompt", "deploy", "-n", "watch/checkpoints")
    assert active() == [True]


def test_prefect_yaml_is_what_the_benchmarks_suites_and_flows_say_now():
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "generate_prefect_yaml", ROOT / "scripts" / "generate_prefect_yaml.py"
    )
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "prefect.yaml").read_text() == generate.text(), "run scripts/generate_prefect_yaml.py"
