"""The README and the pages under docs/ are true: what they show is run, what they name is there.

Commands are run as they stand, page by page, beside one real run of the demo, except for these:

* `modal-eval run` of a model that needs a GPU, a Hub or somebody's endpoint gets `--dry-run`: every option is parsed,
  every file read, every setting checked, and nothing is started.
* `modal-eval run … -b demo` is the run that all pages share, with fewer examples.
* `make` starts from a bare clone and takes minutes: its target has to exist.
* `modal-eval gpus` sees a stand-in for the driver: its `--reap` ends processes.
* `modal-eval node` and `modal-eval worker` need other machines and serve until they are ended: the command has to exist.
* `modal-eval watch` finds a server of its own with an empty bucket; `watch serve` serves until it is ended: its options
  have to parse.
* `prefect server start` serves until it is ended: its options have to parse. So do those of `modal`, which needs an
  account; `modal-eval deploy`, `suite` and `batch` get `--dry-run`.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from modal_eval import errors
from modal_eval.harnesses.adapters import evalplus_oracle
from modal_eval.scoring.sandbox import Limits
from tests.support.aws import aws_server
from tests.support.cli import TIMEOUT_S
from tests.support.compose import services
from tests.support.documents import Command, blocks, commands, links
from tests.support.gpus import Machine
from tests.support.hub_server import TOKEN, hub_server
from tests.support.processes import Mark

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"cli.md", "benchmark-yaml.md", "benchmarks.md"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name not in GENERATED]
LINKED = [*PAGES, *sorted((ROOT / "docs" / "decisions").glob("*.md")), ROOT / "requirements" / "README.md"]
SHARED_RUN = Path("outputs/evals/demo--SmolLM2-135M-Instruct/2ddb308e")
SHARED_ARGUMENTS = ["-m", "SmolLM2-135M-Instruct", "-b", "demo"]


class Reader:
    """Somebody who follows a page in a folder of their own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def follow(self, page: Path) -> None:
        for block in blocks(page):
            if block.file:
                path = self.folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif block.language == "python":
                self.run([sys.executable, "-c", block.text], 0)
            elif block.language == "console":
                for command in commands(block):
                    self.type(command)

    def type(self, command: Command) -> None:
        match command.words:
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"
            case ["export", assignment]:
                name, _, value = assignment.partition("=")
                self.environment.setdefault(name, value)
            case ["cp", source, target]:
                shutil.copy(ROOT / source, self.folder / target)
            case ["docker", "compose", *words]:
                check_compose(words)
            case ["prefect" | ".venv/bin/prefect", *words]:
                self.run([sys.executable, "-m", "prefect", *words, "--help"], 0)
            case ["modal", *words]:
                self.run([sys.executable, "-m", "modal", *words, "--help"], 0)
            case ["modal-eval", "gpus", *words]:
                node = self.folder / "node"  # with GPUs of its own: no page may end what runs on real ones
                node.mkdir(exist_ok=True)
                self.environment |= Machine(node).variables
                self.run([sys.executable, "-m", "modal_eval.cli", "gpus", *words], command.exit_code)
            case ["modal-eval", "node", word, *_]:
                self.run([sys.executable, "-m", "modal_eval.cli", "node", word, "--help"], 0)
            case ["modal-eval", "worker", *_]:
                self.run([sys.executable, "-m", "modal_eval.cli", "worker", "--help"], 0)
            case ["modal-eval", "watch", "serve", *words]:
                self.run([sys.executable, "-m", "modal_eval.cli", "watch", "serve", *words, "--help"], 0)
            case ["modal-eval" | ".venv/bin/modal-eval", *words]:
                self.run([sys.executable, "-m", "modal_eval.cli", *self.affordable(words)], command.exit_code)
            case words:
                pytest.fail(f"nobody checks `{' '.join(words)}`: teach it to this test")

    def affordable(self, words: list[str]) -> list[str]:
        if words[0] == "resume":
            (self.folder / SHARED_RUN / "metadata.json").unlink(missing_ok=True)  # else there is nothing to resume
        dry = words[0] == "run" and (words[1:3] != SHARED_ARGUMENTS[:2] or words[1:5] == SHARED_ARGUMENTS)
        dry = dry or words[0] in ("deploy", "suite", "batch")
        return [*words, "--dry-run"] if dry and "--dry-run" not in words else words

    def run(self, command: list[str], exit_code: int) -> None:
        ran = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert ran.returncode == exit_code, f"{command} ended with {ran.returncode}:\n{ran.stdout}\n{ran.stderr}"
        assert "not pushed" not in ran.stderr, ran.stderr


def check_compose(words: list[str]) -> None:
    """Docker is not where tests are: what is named has to be there, and its services are started by another test."""
    assert words[:4] == ["--file", "deployments/compose.yaml", "--env-file", "production.env"]
    command, *rest = words[4:]
    assert command in ("up", "ps", "stop", "exec"), command
    named = rest if command == "stop" else rest[:1] if command == "exec" else []
    assert set(named) <= set(services()), named


def new_reader(folder: Path, mark: Mark, prefect_api: str) -> Reader:
    names = ("MODAL_EVAL_OUTPUT_DIR", "MODAL_EVAL_MODEL", "MODAL_EVAL_BENCHMARK")
    environment = {name: value for name, value in mark.env.items() if name not in names}
    return Reader(
        folder,
        {
            **environment,
            "PREFECT_API_URL": prefect_api,
            "MODAL_EVAL_STATE_DIR": str(folder / "state"),
            "COLUMNS": "200",
        },
    )


def test_the_sandboxs_page_has_the_limits_that_the_code_has():
    page = (ROOT / "docs" / "sandbox.md").read_text()
    plain = Limits()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]]
        for line in page.splitlines()
        if line.startswith("|")
    }
    assert cells["CPU time of one test"][0].startswith(f"{plain.cpu_s:g} s")
    assert cells["memory of one process"][0].startswith(f"{plain.memory_bytes >> 30} GiB")
    assert cells["processes and threads"] == [str(plain.max_processes), str(evalplus_oracle.LIMITS.max_processes)]
    assert cells["output of one test"][0] == f"{plain.output_bytes >> 20} MiB"
    assert cells["files"] == [f"{plain.disk_bytes >> 20} MiB", f"{evalplus_oracle.LIMITS.disk_bytes >> 20} MiB"]
    assert cells["memory of one process"][1] == f"{evalplus_oracle.LIMITS.memory_bytes >> 30} GiB"
    assert cells["CPU time of all tests of one process"][1] == f"{evalplus_oracle.MAX_TASK_S:g} s"
    assert cells["output of one test"][1].startswith(f"{evalplus_oracle.LIMITS.output_bytes >> 20} MiB")


@pytest.fixture(scope="module", name="shared")
def folder_with_one_real_run(tmp_path_factory, prefect_api):
    """A folder with a real run of the demo, under the name that the pages give it."""
    folder, mark = tmp_path_factory.mktemp("docs"), Mark()
    (folder / "checkpoints" / "run_step400").mkdir(parents=True)
    reader = new_reader(folder, mark, prefect_api)
    arguments = [*SHARED_ARGUMENTS, "--eval.num_examples=6", "--run-dir", str(SHARED_RUN)]
    reader.run([sys.executable, "-m", "modal_eval.cli", "run", *arguments], 0)
    assert mark.wait_until_gone() == {}
    return folder


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_what_a_page_shows_works_when_it_is_typed(page, shared, tmp_path, mark, prefect_api):
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    reader = new_reader(tmp_path, mark, prefect_api)
    with hub_server() as hub, ExitStack() as stack:
        reader.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
        if "modal-eval watch" in page.read_text():
            aws = stack.enter_context(aws_server(tmp_path / "aws"))
            aws.client().create_bucket(Bucket="my-bucket")
            reader.environment |= aws.env
        reader.follow(page)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_block_of_a_page_is_of_a_kind_that_is_tried(page):
    for block in blocks(page):
        assert block.file or block.language in {"console", "python"}, f"nobody checks this block:\n{block.text}"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_every_link_and_picture_of_a_page_is_there(page):
    for target in links(page):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_the_generated_pages_are_what_the_code_says_now():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert set(generate.PAGES) == GENERATED
    for name, make in generate.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == make(), f"docs/{name} is old: run scripts/generate_docs.py"


def test_the_page_of_files_explains_every_key_that_a_real_run_leaves(shared):
    page = (ROOT / "docs" / "files.md").read_text()
    run_dir = shared / SHARED_RUN
    documents = {path.name: json.loads(path.read_text()) for path in run_dir.glob("*.json")}
    documents["calls"] = documents["metadata.json"]["calls"]
    documents["results.jsonl"] = json.loads((run_dir / "results.jsonl").read_text().splitlines()[0])
    kinds = set(documents["metadata.json"]["by_task"])  # columns of the environment
    for name, document in documents.items():
        unknown = {key for key in document if f"`{key}`" not in page} - kinds
        assert not unknown, f"docs/files.md says nothing of {unknown} in {name}"
    for path in run_dir.iterdir():
        assert f"`{path.name}" in page, f"docs/files.md says nothing of {path.name}"


def test_the_readme_names_every_benchmark_and_every_exit_code():
    page = (ROOT / "README.md").read_text()
    for path in (ROOT / "benchmark_configs").glob("*.yaml"):
        assert f"`{path.stem}`" in page
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}


def test_every_picture_is_light_enough_for_a_page():
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size < 300_000, path


def test_the_drawn_run_shows_the_command_of_make_demo():
    drawn = (ROOT / "docs" / "images" / "demo.svg").read_text().replace("&#160;", " ")
    makefile = (ROOT / "Makefile").read_text()
    assert f"modal-eval {' '.join(['run', *SHARED_ARGUMENTS])}" in drawn
    assert f"modal-eval {' '.join(['run', *SHARED_ARGUMENTS])}" in makefile
    assert os.path.sep + "tmp" not in drawn
