"""`pip install .` gives a command a script, and each answers --help from outside the repository."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The project in a folder of its own; its dependencies are those of this environment."""
    pytest.importorskip("setuptools", reason="setuptools builds the package")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ["pyproject.toml", "README.md", "requirements.txt", "LICENSE", *(p.name for p in ROOT.glob("*.py"))]:
        (source / name).write_bytes((ROOT / name).read_bytes())  # so that the build leaves nothing in the repository
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--target", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return out


def test_every_script_has_a_command():
    scripts = {p.stem for p in ROOT.glob("*.py")} - {"energy_lens"}  # the import name
    assert {target.removesuffix(":main") for target in COMMANDS.values()} == scripts


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers(command, installed, tmp_path):
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / command), "--help"], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {command} ") and "--seed" in done.stdout, done.stderr


def test_version_and_completion(installed, tmp_path):
    """An installed copy knows its release; a script in the repository its commit; argcomplete gets flags and choices."""
    env = os.environ | {"PYTHONPATH": str(installed)}
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert subprocess.run([installed / "bin" / "janus-train", "--version"], **run).stdout == f"janus-arc {release}, commit unknown\n"
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    for script in ("energy_lens_minimal", "real_model_extension"):
        shown = subprocess.run([sys.executable, ROOT / f"{script}.py", "--version"], **run).stdout
        assert head and f"commit {head}" in shown
    for typed, offered in {
        "janus-train --pres": {"--preset", "--pressure", "--pressure_warmup"},
        "janus-train --preset ": {"smoke", "full"},
    }.items():
        asked = {
            "_ARGCOMPLETE": "1",
            "COMP_LINE": typed,
            "COMP_POINT": str(len(typed)),
            "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "o"),
        }
        subprocess.run([installed / "bin" / "janus-train"], **run | {"env": env | asked})
        assert offered <= set((tmp_path / "o").read_text().replace("\013", "\n").split()), typed
