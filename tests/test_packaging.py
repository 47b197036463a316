"""What a newcomer meets: packages, the top level, CONTRIBUTING, the committed notebooks, the commands."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from fedssg_helpers import course

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
TOP_LEVEL = {
    ".book",
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "Makefile",
    "README.md",
    "data",
    "environment.yml",
    "fedssg_helpers",
    "notebooks",
    "pyproject.toml",
    "tests",
}


def read(path: Path):
    return nbformat.read(path, as_version=4)


def test_conda_and_pip_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "environment.yml").read_text()
    conda = yaml.safe_load(text)["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert sorted(set(pip) - {"-e ."}) == sorted(project["dependencies"])
    assert f"python{project['requires-python']}" in conda
    lines = re.findall(r"^ +- (?!pip:|conda-forge).*$", text, flags=re.M)
    assert all("#" in line for line in lines), "every package has its reason beside it"


def test_extras_for_later_lessons_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"test", "flower", "privacy", "explorer", "book", "pfl"} <= set(extras)
    assert any(line.startswith("ruff") for line in extras["test"])
    assert all("python_version" in line for line in extras["pfl"]), "pfl is published for Python below 3.13"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_have_their_range_beside_them(path):
    """So that the command can refuse others before it starts, see `course.convert`."""
    for name, parameter in papermill.inspect_notebook(str(path)).items():
        if parameter["inferred_type_name"] in ("int", "float"):
            course.convert(name, parameter["default"], parameter["inferred_type_name"], parameter["help"])
            with pytest.raises(course.CourseError, match=f"'{name}' is -9; it must be"):
                course.convert(name, "-9", parameter["inferred_type_name"], parameter["help"])


def test_top_level_holds_nothing_else():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode or not listing.stdout:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listing.stdout.splitlines()} <= TOP_LEVEL


def test_ci_script_lints_first_and_the_workflow_calls_it():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    script = (ROOT / ".ci" / "run").read_text()
    assert 0 < script.index("make lint") < script.index("make test")
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"][0] == "3.11" and job["steps"][-1] == {"run": ".ci/run"}


def test_hooks_need_no_network():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert all(hook["entry"].startswith("ruff") for hook in repos[0]["hooks"])


def test_every_place_that_contributing_names_is_there():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w/]+\.py)`|(?:TESTS=\"?|`)((?:tests|notebooks)/[\w.]+)", text)
    for path in {first or second for first, second in named}:
        assert (ROOT / path).exists(), path
    names = re.findall(r"`([a-z]+)\.(\w+)`", text)
    assert len(names) >= 20
    for module, name in names:
        assert hasattr(importlib.import_module(f"fedssg_helpers.{module}"), name), f"{module}.{name}"


def test_one_file_is_tested_without_the_start_of_workers():
    def command(*words):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        line = ["make", "-n", "--no-print-directory", "test", *words]
        result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        return result.stdout.splitlines()[-1]

    assert "-n 2" not in command("TESTS=tests/test_keys.py -k one")
    assert "-n 2" in command() and "--nbval-lax" in command() and command().endswith("tests notebooks")
    assert "-n 2" in command("TESTS=tests") and "--nbval" not in command("TESTS=tests")
    assert "-n 2" in command("TESTS=tests/test_keys.py tests/test_data.py")
    assert "--nbval-lax" in command("TESTS=notebooks/00_start_here.ipynb")


def test_make_names_the_cure_for_an_old_python(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for command in ("course", "test"):
        result = subprocess.run(
            ["make", command, "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert result.returncode and "not Python 3.11 or newer" in result.stderr
        assert not (tmp_path / ".venv").exists()


def test_make_help_lists_the_commands():
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert {"make course", "make test", "make quick", "make lint"} <= {
        line[:14].strip() for line in result.stdout.splitlines()
    }


def test_the_lessons_and_the_appendix_are_committed():
    assert [path.name[:2] for path in LESSONS] == ["00", "01", "02", "03", "04", "05", "06", "07", "08", "09"]
    for name in ("A1_accuracy", "A2_speed", "A3_trust", "A4_traps", "A5_shortcut_trap"):
        assert (ROOT / "notebooks" / f"{name}.ipynb").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_clean(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.language == "python", "papermill stops without it"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "no widget state, no runner's metadata"
    assert "version" not in notebook.metadata.language_info
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
        assert "injected-parameters" not in cell.metadata.get("tags", [])
    assert "widget-state" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lesson_is_committed_executed(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], "make notebooks"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if any("widget" in kind for kind in o.get("data", {}))]
    assert any("image/png" in o.get("data", {}) for o in outputs), "a reader without a kernel sees no picture"
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and tags.count("headline") == 1
    headline = next(cell for cell in cells if "headline" in cell.metadata.get("tags", []))
    assert any("image/png" in output.get("data", {}) for output in headline.outputs)


def test_without_a_clone_the_cure_is_named_and_results_stay_outside(tmp_path):
    shutil.copytree(ROOT / "fedssg_helpers", tmp_path / "site-packages" / "fedssg_helpers")
    (tmp_path / "here").mkdir()
    code = """
from fedssg_helpers import data, runs
from fedssg_helpers.__main__ import main
print(runs.out_folder())
for name in ("phantom", "ham10000"):
    try:
        data.load(name)
    except data.DataError as error:
        print(error)
raise SystemExit(main(["run"]))
"""
    place = os.environ | {"PYTHONPATH": str(tmp_path / "site-packages"), "FEDSSG_OUT": "", "FEDSSG_DATA": ""}
    known = {"cwd": tmp_path / "here", "env": place, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-P", "-c", code], **known)
    where, *errors = result.stdout.splitlines()
    assert where == str(tmp_path / "here" / "out") and result.returncode == 2, result.stderr
    assert len(errors) == 2 and all("pip install -e ." in text for text in [*errors, result.stderr])
    assert {path.name for path in (tmp_path / "site-packages").iterdir()} == {"fedssg_helpers"}
