"""The same phases on a GPU, where there is one."""

import numpy as np
import pandas as pd
import pytest
import torch

import ablation_test
import harvest_activations
import hero_head_analysis
import janus_adaptive as janus
import train_sae

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device on this machine: the GPU path is not tested",
)


def test_logits_are_those_of_the_cpu(smoke_checkpoint):
    (a, _), (b, _) = (
        janus.load_checkpoint(smoke_checkpoint, torch.device(name), False)
        for name in ("cpu", "cuda")
    )
    x = torch.randint(a.cfg.vocab_size, (4, a.cfg.seq_len))
    with torch.inference_mode():
        assert (a(x)[0] - b(x.cuda())[0].cpu()).abs().max() < 1e-3


def test_ablation_and_harvest_agree_with_the_cpu(smoke_checkpoint, tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        out, where = tmp_path / device, ["--device", device, "--dtype", "float32"]
        harvest = [
            "--model_path",
            str(smoke_checkpoint),
            "--tokens",
            "2560",
            "--layers",
            "2",
            "--save_dir",
            str(out),
        ]
        assert harvest_activations.main([*harvest, *where]) == 0
        ablate = [
            "--adaptive_model",
            str(smoke_checkpoint),
            "--n_seqs",
            "8",
            "--mode",
            "mean",
            "--bootstrap",
            "200",
        ]
        assert ablation_test.main([*ablate, "--save_file", str(out / "r.csv"), *where]) == 0
        z = np.load(out / "adaptive" / "L2.z.npy").astype(np.float32)
        found[device] = (
            z,
            pd.read_csv(out / "r.csv").sort_values(["layer", "head"])["delta"].to_numpy(),
        )
    (z, delta), (z_gpu, delta_gpu) = found.values()
    assert np.abs(z - z_gpu).max() < 1e-2 and np.abs(delta - delta_gpu).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_phases_run(dtype, smoke_args, tmp_path):
    gpu = ["--device", "cuda", "--dtype", dtype]
    train = [a for a in smoke_args if a not in ("--dtype", "float32")]
    assert janus.main([*train, *gpu, "--compile", "off", "--save_dir", str(tmp_path / "v1")]) == 0
    model, acts, csv = (
        tmp_path / "v1" / "janus_adaptive_final.pt",
        tmp_path / "activations",
        tmp_path / "r.csv",
    )
    assert (
        harvest_activations.main(
            ["--model_path", str(model), "--tokens", "5120", "--save_dir", str(acts), *gpu]
        )
        == 0
    )
    sae = [
        "--activations_dir",
        str(acts),
        "--save_dir",
        str(tmp_path / "saes"),
        "--steps",
        "20",
        "--batch_size",
        "256",
    ]
    assert train_sae.main([*sae, *gpu]) == 0
    assert (
        ablation_test.main(
            ["--adaptive_model", str(model), "--n_seqs", "8", "--save_file", str(csv), *gpu]
        )
        == 0
    )
    hero = [
        "--ablation_csv",
        str(csv),
        "--saes_dir",
        str(tmp_path / "saes"),
        "--activations_dir",
        str(acts),
        "--save_dir",
        str(tmp_path / "h"),
    ]
    assert (
        hero_head_analysis.main([*hero, "--device", "cuda", "--n_seqs", "4", "--n_features", "2"])
        == 0
    )
