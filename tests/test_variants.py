"""README's "Try a variant": each edit is performed from the text of the page, and does what it says."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def part(title: str) -> str:
    """The text of README from a bold title to the next one."""
    start = README.index(f"**{title}**")
    end = README.find("\n**", start + 4)
    return README[start:end]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def edited(script: str, old: str, new: str, folder: Path):
    """The script with one edit in its method section, imported from `folder`."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    method = source[source.index("method: edit here") : source.index("-- run\n")]
    assert source.count(old) == 1, old
    assert old in method, "the edit lies in the marked section"
    path = folder / f"{script}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"edited_{script}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_a_setpoint_that_falls(tmp_path, smoke_args):
    text = part("A setpoint that falls.")
    old = re.search(r"replace `([^`]+)` by", text)[1]
    janus = edited("janus_adaptive", f"    {old}\n", code_blocks(text)[0], tmp_path)
    flags = [*smoke_args, "--save_dir", str(tmp_path / "run")]
    args = janus.parse_args(flags)
    setpoints = [janus.setpoint(step, args) for step in range(args.steps + 1)]
    assert setpoints[0] == pytest.approx(0.02)
    assert setpoints[-1] == pytest.approx(args.target_sigma)
    assert np.allclose(np.diff(setpoints, 2), 0, atol=1e-12), "a straight line"

    assert janus.main(flags) == 0
    state = torch.load(tmp_path / "run" / "janus_adaptive_final.pt", weights_only=True)
    pressure = janus.Pressure(args)
    pressure.load_state_dict(state["pressure"])
    assert pressure.phase in ("auto", "hold")
    # The loop uses it: a sample at the setpoint of its step has no proportional term
    step = args.steps // 2
    pressure.phase = "auto"
    for loop in pressure.loops:
        loop.beta = 0.0
    pressure.observe(step, [janus.setpoint(step, args)] * args.n_layers, 1.0)
    assert pressure.loops[0].p == pytest.approx(0, abs=1e-12)


def test_a_sparse_autoencoder_with_signed_latents(tmp_path, smoke_checkpoint, cache_dir):
    text = part("A sparse autoencoder with signed latents.")
    function, entry = code_blocks(text)
    source = (ROOT / "train_sae.py").read_text(encoding="utf-8")
    table = re.search(r"^ARCHITECTURES[^\n]*\{\n", source, re.MULTILINE)[0]
    sae = edited("train_sae", table, f"{function}\n\n{table}{entry}", tmp_path)

    harvest = importlib.import_module("harvest_activations")
    dumps = ["--save_dir", str(tmp_path / "activations"), "--tokens", "4096"]
    model = ["--model_path", str(smoke_checkpoint), "--run_name", "adaptive", "--layers", "3"]
    assert harvest.main([*model, *dumps]) == 0
    saes = tmp_path / "saes"
    flags = ["--runs", "adaptive", "--layers", "3", "--arch", "abstopk", "--k", "4"]
    flags += ["--activations_dir", str(tmp_path / "activations"), "--save_dir", str(saes)]
    assert sae.main(flags) == 0

    folder = saes / "adaptive" / "L3"
    loaded = sae.load_sae(folder)
    rows = torch.from_numpy(
        np.load(tmp_path / "activations" / "adaptive" / "L3.z.npy")[:256]
    ).float()
    latents = loaded.encode(rows)
    assert (latents < 0).any() and (latents > 0).any()
    assert ((latents != 0).sum(1) <= 4).all()
    metrics = (saes / "sae_metrics.csv").read_text()
    assert "abstopk" in metrics
    assert json.loads((folder / "sae_weights.safetensors.json").read_text())
