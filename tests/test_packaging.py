"""`pip install .` gives a command a script, and each answers --help from outside the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def git(where: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", where, *who, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The project in a repository of its own, so that the build leaves nothing in this one."""
    folder = tmp_path_factory.mktemp("source")
    for name in [
        "pyproject.toml",
        "README.md",
        "requirements.txt",
        "LICENSE",
        *(p.name for p in ROOT.glob("*.py")),
    ]:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    shutil.copytree(ROOT / "pages", folder / "pages")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    return folder


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """The installed project; its dependencies are those of this environment."""
    pytest.importorskip("setuptools_scm", reason="setuptools-scm builds the package")
    out = tmp_path_factory.mktemp("site")
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        str(out),
    ]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return out


def test_every_script_has_a_command():
    scripts = {p.stem for p in ROOT.glob("*.py")} - {"energy_lens"}  # the import name
    assert {target.removesuffix(":main") for target in COMMANDS.values()} == scripts


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers(command, installed, tmp_path):
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / command), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert (
        done.returncode == 0
        and done.stdout.startswith(f"usage: {command} ")
        and "--seed" in done.stdout
    ), done.stderr


def test_version(source, installed, tmp_path):
    """An installed copy knows the commit it was built from, a script in the repository that of now."""
    env = os.environ | {"PYTHONPATH": str(installed)}
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
    shown = subprocess.run([installed / "bin" / "janus-train", "--version"], **run).stdout
    said = shown.rpartition("commit ")[2].strip()
    assert (
        shown.startswith("janus-arc 0.")
        and len(said) >= 7
        and git(source, "rev-parse", "HEAD").startswith(said)
    ), shown
    head = git(ROOT, "rev-parse", "--short=12", "HEAD")
    for script in ("energy_lens_minimal", "real_model_extension"):
        shown = subprocess.run([sys.executable, ROOT / f"{script}.py", "--version"], **run).stdout
        assert head and f"commit {head}" in shown


def test_an_installed_command_finds_its_pages(installed):
    code = "import hero_head_analysis as h; print(h.render_page('energy_lens.html', title='T', blocks=[], show=str, png_address=str)[:15])"
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=installed
    )
    assert done.stdout.lower().startswith("<!doctype html"), done.stderr
