"""`modal-eval node` against a real OpenSSH server, a real Prefect server and a real worker on the far side."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

import blocks
from modal_eval.cli.node import name_for, ready
from modal_eval.errors import NodeError
from modal_eval.nodes import Host, Service, inspect, install_checkout, ssh
from modal_eval.nodes.service import environment_text
from modal_eval.processes import start_ticks
from tests.support.cli import Cli, finished
from tests.support.pools import Pool, deploy_busy, is_there
from tests.support.processes import MARK_VARIABLE, Mark, is_running, until
from tests.support.sshd import SshServer, make_key, ssh_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with ssh_server(tmp_path / "node") as server:
        monkeypatch.setenv("MODAL_EVAL_SSH_CONFIG", str(server.config))
        yield server


@pytest.fixture
def there(node: SshServer, cli: Cli) -> list[str]:
    """Options of `node add` for the far side: this checkout, its Python, folders of its own."""
    cli.env["MODAL_EVAL_SSH_CONFIG"] = str(node.config)
    variables = {
        MARK_VARIABLE: cli.mark.value, "MODAL_EVAL_STATE_DIR": str(node.home / "state"), "PREFECT_HOME": str(node.home / "p"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }  # fmt: skip
    return [
        "--home", str(ROOT), "--python", sys.executable, "--min-free=0.1", "--env=STRANGE=a \"b\" $c `d` \\e",
        *(f"--env={name}={value}" for name, value in variables.items()),
    ]  # fmt: skip


def test_a_node_that_was_added_takes_runs_comes_back_when_killed_drains_and_is_removed(
    cli: Cli,
    there: list[str],
    prefect_api: str,
    mark: Mark,
    node: SshServer,
):
    deployed = deploy_busy(prefect_api)
    pool = Pool(cli, deployed)
    added = cli("node", "add", "node-a", *there, f"--pool={deployed}")
    assert f"node-a: modal-eval 0.1.0, no GPU, {deployed}, a supervised process" in added.stdout
    state = node.home / "state" / "workers" / "node-a.json"
    orphan, left = pool.schedule("orphan")
    is_there(left / "working")
    first = json.loads(state.read_text())["pid"]
    os.kill(first, signal.SIGKILL)
    is_there(left / "given back")
    until(lambda: json.loads(state.read_text() or "{}").get("pid", first) != first, 120)
    running, folder = pool.schedule("on-the-node")
    is_there(folder / "working")
    worker = json.loads(state.read_text())["pid"]
    assert b'STRANGE=a "b" $c `d` \\e' in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    listed = of_node_a(cli)
    assert listed is not None
    assert (listed["worker"], listed["pool"]) == ("online", deployed)
    assert "finishes what it runs" in cli("node", "drain", "node-a").stdout
    draining = of_node_a(cli)
    assert draining is not None
    assert draining["worker"] == "draining"
    late, _ = pool.schedule("too-late")
    (folder / "enough").touch()
    until(lambda: not is_running(worker), 120)
    assert (pool.state(running), pool.state(late)) == ("Completed", "Scheduled")
    pool.forget(late)
    assert pool.state(orphan) == "Crashed"
    assert mark.wait_until_gone() == {}, "a drained worker is not started again"
    cli("node", "remove", "node-a")
    assert of_node_a(cli) is None
    assert not (node.home / ".local/state/modal-eval/services/node-a").exists()


def of_node_a(cli: Cli) -> dict[str, Any] | None:
    """Its row of `node list`; other tests have nodes of their own on the same Prefect server."""
    rows = json.loads(cli("node", "list", "--json").stdout)
    return next((row for row in rows if row["node"] == "node-a"), None)


@pytest.mark.parametrize(
    ("host", "name"), [("gpu-node-1", "gpu-node-1"), ("GPU.Node_1", "gpu-node-1"), ("10.0.0.7", "10-0-0-7")]
)
def test_a_node_is_called_as_its_host_in_letters_that_prefect_takes(host: str, name: str):
    assert name_for(host, None) == name


def test_a_name_that_prefect_would_not_take_is_refused_before_anything_is_looked_at(cli: Cli):
    for host, given in (("node-a", ["--name=gpu_node_1"]), ("node-a", ["--name=Gpu"]), ("_", [])):
        said = cli("node", "add", host, *given, expect=2).stderr
        assert "give --name of small letters, digits and '-'" in said
        assert len(said.strip().splitlines()) == 1


def test_a_limit_or_a_port_that_no_worker_could_have_is_refused_before_anything_is_looked_at(cli: Cli):
    add = ["node", "add", "node-a"]
    cases = [[*add, "--limit=0"], [*add, "--limit=-1"], [*add, "--port=0"], [*add, "--port=65536"]]
    for words in (*cases, ["worker", "--pool=a100", "--limit=0"]):
        said = cli(*words, expect=2).stderr
        assert words[-1].partition("=")[0] in said
        assert "Must be" in said
        assert len(said.strip().splitlines()) == 1


def test_a_node_that_is_gone_is_forgotten_without_going_there(cli: Cli, prefect_api: str):
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        blocks.register_all()
        blocks.Node(host="nowhere.invalid", home="/srv/m", python="/srv/m/python").save("gone", overwrite=True)
    assert "`modal-eval node remove gone --forget`" in cli("node", "remove", "gone", expect=1).stderr
    assert "gone is forgotten" in cli("node", "remove", "gone", "--forget").stdout
    assert "there is no node called gone" in cli("node", "remove", "gone", "--forget", expect=2).stderr


def test_a_unit_that_systemd_does_not_know_is_removed_and_another_fault_of_systemd_is_told(
    node: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = tmp_path / "programs" / "systemctl"
    program.parent.mkdir()
    monkeypatch.setattr(ssh, "PATH", f"{program.parent}:{ssh.PATH}")
    service = Service.of(Host("node-a"), "node-a", str(ROOT), sys.executable, (), systemd=True)
    folder = Path(service.folder)

    def say(words: str, code: int):
        program.write_text(f'#!/bin/sh\n[ "$2" != disable ] || exit 1\necho "{words}" >&2\nexit {code}\n')
        program.chmod(0o755)
        folder.mkdir(parents=True, exist_ok=True)

    say("Failed to connect to bus: No medium found", 1)
    with pytest.raises(NodeError, match="node-a: Failed to connect to bus"):
        service.remove()
    assert folder.exists()
    say(f"Failed to stop {service.unit}: Unit {service.unit} not loaded.", 5)
    service.signal("drain")
    service.remove()
    assert not folder.exists()


def test_a_new_node_whose_worker_does_not_come_up_leaves_no_service(
    cli: Cli, there: list[str], node: SshServer, mark: Mark
):
    services = node.home / ".local/state/modal-eval/services"
    adding = cli.start("node", "add", "node-a", *there, "--name=node-b", "--api-url=http://127.0.0.1:9/api")
    cli.wait_for(lambda: (services / "node-b" / "log").exists(), adding)
    adding.send_signal(signal.SIGINT)
    finished(adding, 130)
    assert list(services.iterdir()) == []
    assert mark.wait_until_gone() == {}
    assert "there is no node called node-b" in cli("node", "remove", "node-b", expect=2).stderr


def test_a_drained_node_without_systemd_stays_away_after_a_reboot_until_it_is_added_again(
    node: SshServer, mark: Mark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table, program, others = tmp_path / "table", tmp_path / "programs" / "crontab", "0 3 * * * a backup\n"
    table.write_text(others)
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1" != -l ] || exec cat "{table}"\ncat > "{table}.new"\nmv "{table}.new" "{table}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(ssh, "PATH", f"{program.parent}:{ssh.PATH}")
    service = Service.of(Host("node-a"), "node-a", str(ROOT), sys.executable, (), systemd=False)
    nobody = {MARK_VARIABLE: mark.value, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    for end in (lambda: service.signal("drain"), service.remove):
        assert service.start(nobody) == []
        assert table.read_text() == f"{others}@reboot /bin/sh {service.folder}/start\n"
        until(lambda: any("supervisor.py" not in line for line in mark.processes().values()))
        end()
        assert table.read_text() == others
        assert mark.wait_until_gone() == {}


def test_what_a_node_lacks_is_said_in_one_line(node: SshServer, tmp_path: Path):
    host, nowhere = Host("node-a"), str(tmp_path / "nowhere")
    cases = [
        ("there is no Python with modal-eval at /nonexistent/python on node-a", str(ROOT), "/nonexistent/python", 0.1),
        ("node-a has no room: .* GB are free under", str(ROOT), sys.executable, 1e6),
        (f"there is no checkout of modal-eval in {nowhere} on node-a", nowhere, sys.executable, 0.1),
    ]
    for words, home, python, min_free in cases:
        with pytest.raises(NodeError, match=words) as caught:
            ready(host, home, python, min_free, install=False)
        assert "\n" not in str(caught.value)
    other = tmp_path / "other"
    subprocess.run(["git", "clone", "-q", "--no-checkout", str(ROOT), str(other)], check=True)
    commit = ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(["git", "-C", str(other), *commit], check=True)
    (other / "flows").mkdir()
    with pytest.raises(NodeError, match="node-a is at revision .* and this checkout at .*; runs of both may not meet"):
        ready(host, str(other), sys.executable, 0.1, install=False)


def test_what_ssh_refuses_is_said_in_one_line_and_nothing_is_guessed(cli: Cli, node: SshServer, tmp_path: Path):
    known = node.known_hosts.read_text()
    node.known_hosts.write_text("")
    refused("the host key of node-a is not known here")
    node.trust(make_key(tmp_path / "other_key"))
    refused("node-a shows another host key than the known one")
    cli.env["MODAL_EVAL_SSH_CONFIG"] = str(node.config)
    ran = cli("node", "add", "node-a", expect=1)
    assert ran.stderr.startswith("modal-eval: node-a shows another host key")
    assert len(ran.stderr.strip().splitlines()) == 1
    node.known_hosts.write_text(known)
    (node.folder / "authorized_keys").write_text("")
    refused("node-a lets nobody in with the keys of this user")
    refused("there is no host called nowhere.invalid", "nowhere.invalid")
    with pytest.raises(NodeError, match="'-oProxyCommand=x' is no name of a host"):
        Host("-oProxyCommand=x")
    assert "--home=here is no absolute path" in cli("node", "add", "node-a", "--home", "here", expect=2).stderr


def refused(words: str, host: str = "node-a") -> None:
    with pytest.raises(NodeError, match=words) as caught:
        Host(host).run("true")
    assert "\n" not in str(caught.value)


def test_this_revision_is_put_on_a_node_that_has_none(node: SshServer):
    host, home = Host("node-a"), node.home / "a folder" / "modal-eval"
    before = inspect(host, str(home), sys.executable)
    assert (before.system, before.has_checkout, before.revision) == ("Linux", False, "")
    if (ROOT / ".git" / "shallow").exists():
        with pytest.raises(NodeError, match="is a shallow clone"):
            install_checkout(host, str(home))
        return
    install_checkout(host, str(home))
    after = inspect(host, str(home), sys.executable)
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (after.has_checkout, after.revision) == (True, here.strip())
    assert (home / "flows" / "eval.py").is_file()


def test_the_unit_is_one_that_systemd_takes(node: SshServer, tmp_path: Path):
    arguments = ("--pool", "a100", "--queue=high", "--limit", "8")
    service = Service.of(Host("node-a"), "node-a", str(ROOT), sys.executable, arguments, systemd=True)
    unit = tmp_path / service.unit
    unit.write_text(service.unit_text())
    assert (
        f"ExecStart={sys.executable} -m modal_eval.cli worker --pool a100 --queue=high --limit 8\n" in unit.read_text()
    )
    assert "@" not in unit.read_text().partition("[Unit]")[2]
    (Path(service.folder)).mkdir(parents=True)
    (Path(service.folder) / "env").write_text(environment_text({"A": "b"}))
    try:
        checked = subprocess.run(["systemd-analyze", "--user", "verify", str(unit)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("systemd-analyze is not installed")
    complaints = [line for line in checked.stderr.splitlines() if service.unit in line]
    assert complaints == []


def test_start_ticks_of_the_supervisor_are_those_of_the_library(node: SshServer):
    told = Host("node-a").run("sed 's/.*) //' /proc/$$/stat | cut -d' ' -f20; echo $PPID; echo \"$HOME\"").split()
    assert float(told[0]) > start_ticks(os.getpid())
    assert told[2] == str(node.home)
