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
