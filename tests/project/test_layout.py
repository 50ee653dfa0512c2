"""The shape of the repository: what Prefect's loader and a newcomer rely on."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT_FOLDERS = ("flows", "tasks", "blocks", "deployments")


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def text_of(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


@pytest.mark.parametrize("folder", [folder for folder in PROJECT_FOLDERS if (ROOT / folder).is_dir()])
def test_no_file_of_a_project_folder_bears_the_name_of_an_installed_module(folder):
    """Prefect's loader and Modal's leave a file's folder first on `sys.path`: `modal.py` would replace the real one."""
    for path in (ROOT / folder).glob("*.py"):
        if path.stem != "__init__":
            assert importlib.util.find_spec(path.stem) is None, f"{path} shadows an installed module"


@pytest.mark.parametrize("folder", [folder for folder in PROJECT_FOLDERS if (ROOT / folder).is_dir()])
def test_every_project_folder_is_a_package(folder):
    assert (ROOT / folder / "__init__.py").is_file()


def test_every_flow_loads_for_real_by_its_entrypoint():
    script = (
        "import sys; from prefect.flows import load_flow_from_entrypoint as load\n"
        "print(load(sys.argv[1], use_placeholder_flow=False).name)"
    )
    for path in sorted((ROOT / "flows").glob("*.py")):
        if path.stem == "__init__":
            continue
        ran = subprocess.run(
            [sys.executable, "-c", script, f"flows/{path.name}:{path.stem}"], cwd=ROOT, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == path.stem


def test_flow_files_hold_only_flows():
    for path in (ROOT / "flows").glob("*.py"):
        assert not re.search(r"^class ", text_of(path), re.MULTILINE), (
            f"{path} defines a class: Prefect makes a twin of it"
        )


def test_no_file_names_a_package_registry_or_a_path_of_one_machine():
    registries = re.compile(
        r"pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian\.org|index-url\s*=|/root/|/work/main"
    )
    allowed = {Path(__file__)}
    for path in tracked_files():
        if path not in allowed:
            assert not registries.search(text_of(path)), path


def test_no_file_stays_without_bound_on_its_length():
    for path in tracked_files():
        if path.suffix == ".py" and "src" in path.parts:
            assert len(text_of(path).splitlines()) <= 400, f"{path} is longer than 400 lines"


def test_the_wheel_holds_the_library_and_nothing_of_the_project(tmp_path):
    import zipfile

    ran = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "modal_eval/cli/app.py" in names
    assert all(name.startswith(("modal_eval/", "modal_eval-")) for name in names)
