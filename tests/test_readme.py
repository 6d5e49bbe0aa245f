"""What README promises: its commands parse, its files exist, every script answers --help, and nothing runs on import."""

import importlib
import math
import re
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = [
    "janus_adaptive",
    "harvest_activations",
    "train_sae",
    "ablation_test",
    "hero_head_analysis",
]
COMMANDS = sorted(set(re.findall(r"python (?!tools/)\w+\.py[^`\n|]*", README)))


def test_readme_shows_the_published_sequence():
    for script in SCRIPTS:
        assert any(c.startswith(f"python {script}.py --") for c in COMMANDS), script


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command, monkeypatch):
    _, script, *argv = shlex.split(command.strip())
    module = importlib.import_module(script.removesuffix(".py"))
    module.parse_args(argv)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)", README)) | set(
        re.findall(r"^make ([\w-]+)", README, re.M)
    ):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_linked_files_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_shared_flags_and_import_is_inert(script, tmp_path, tmp_path_factory):
    mpl = str(tmp_path_factory.mktemp("matplotlib"))  # its font cache
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MPLCONFIGDIR": mpl,
        "XDG_CACHE_HOME": mpl,
    }
    r = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert r.returncode == 0 and not list(tmp_path.iterdir())
    for flag in (
        "--seed",
        "--device",
        "--dtype",
        "--overwrite",
        "--preset",
        "--cache_dir",
        "--skip_probe",
    ):
        assert flag in r.stdout
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script}"
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert r.returncode == 0 and r.stdout == "" and not list(tmp_path.iterdir())


def test_no_script_imports_another():
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.M))
        assert not imported & (set(SCRIPTS) | {"tools", "energy_lens", "energy_lens_minimal"})
        assert not re.search(
            r"allow_pickle=True|weights_only=False|pickle\.load|(?<![.\w])(exec|eval)\(", source
        )


def test_bigram_against_a_dictionary_version():
    sys.path.insert(0, str(ROOT / "tools"))
    from headlines import bigram_loss

    rng = np.random.default_rng(0)
    train, val, n = rng.integers(0, 9, 400) % 7, rng.integers(0, 9, 60), 9
    follow = defaultdict(Counter)
    for a, b in zip(train[:-1], train[1:], strict=True):
        follow[a][b] += 1
    unigram = [((train == w).sum() + 1) / (len(train) + n) for w in range(n)]

    def p(w, v):
        total, kinds = sum(follow[v].values()), len(follow[v])
        return (follow[v][w] + kinds * unigram[w]) / (total + kinds) if total else unigram[w]

    expected = -np.mean([math.log(p(w, v)) for v, w in zip(val[:-1], val[1:], strict=True)])
    assert math.isclose(bigram_loss(train, val[:-1], val[1:], n), expected, rel_tol=1e-12)
    for v in range(n):
        assert math.isclose(sum(p(w, v) for w in range(n)), 1.0)
