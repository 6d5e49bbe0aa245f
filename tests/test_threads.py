"""How many threads a script takes. The clock is the tests': no time is measured."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import janus_adaptive as janus

ROOT = Path(janus.__file__).parent
SCRIPTS = [
    "janus_adaptive",
    "harvest_activations",
    "train_sae",
    "ablation_test",
    "hero_head_analysis",
    "energy_lens_minimal",
    "real_model_extension",
]


@pytest.fixture
def clock(monkeypatch):
    """Four threads at the start, and steps that take as long as {threads: seconds} says."""
    before = torch.get_num_threads()
    now = [0.0]

    def step_of(seconds):
        def step():
            now[0] += seconds[torch.get_num_threads()]

        return step

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    torch.set_num_threads(4)
    yield step_of
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({4: 1.0, 1: 3.0}, 4),  # an idle machine
        ({4: 3.0, 1: 1.0}, 1),  # cores that others use
        ({4: 1.0, 1: 1.05}, 1),  # hardly a difference: chance must not decide the rounding
        ({4: 1.0, 1: 1.2}, 4),
    ],
)
def test_the_faster_number_of_threads_is_taken(clock, seconds, chosen):
    took = janus.choose_threads(clock(seconds), None)
    assert torch.get_num_threads() == chosen
    assert took == pytest.approx(seconds[chosen])


def test_a_number_that_is_asked_for_is_taken(clock):
    took = janus.choose_threads(clock({4: 1.0, 3: 7.0, 1: 1.0}), 3)
    assert torch.get_num_threads() == 3
    assert took == pytest.approx(7.0)


def test_with_one_thread_there_is_nothing_to_choose(clock):
    torch.set_num_threads(1)
    assert janus.choose_threads(clock({1: 2.0}), None) == pytest.approx(2.0)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (12.4, "12 s"), (99, "99 s"), (600, "10.0 min")]
)
def test_times_are_said_for_people(seconds, said):
    assert janus.duration(seconds) == said


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_sleep_while_they_wait(script):
    """The variable must be there before torch is loaded, and a user's own is respected."""
    for given, expected in ((None, "passive"), ("active", "active")):
        environment = {
            name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"
        }
        if given:
            environment["OMP_WAIT_POLICY"] = given
        program = f"""
import builtins, os, sys
real = builtins.__import__
def note(name, *rest):
    if name == "torch" and "torch" not in sys.modules:
        print(os.environ.get("OMP_WAIT_POLICY"))
        sys.exit()
    return real(name, *rest)
builtins.__import__ = note
import {script}
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [expected], done.stderr


def test_the_record_says_how_many_there_were_and_resume_takes_as_many(smoke_args, tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        flags = [*smoke_args, "--save_dir", str(tmp_path)]
        assert janus.main([*flags, "--threads", "2", "--save_interval", "3"]) == 0
        assert json.loads((tmp_path / "run.json").read_text())["hardware"]["threads"] == 2
        # As if it had been stopped before its end
        for path in tmp_path.glob("janus_*"):
            path.unlink()
        torch.set_num_threads(1)
        assert janus.main([*flags, "--save_interval", "3", "--resume"]) == 0
        assert torch.get_num_threads() == 2
        assert json.loads((tmp_path / "run.json").read_text())["hardware"]["threads"] == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(SystemExit) as stopped:
        janus.main([*flags, "--threads", "0", "--overwrite"])
    assert stopped.value.code == 2
    assert "--threads" in capsys.readouterr().err
