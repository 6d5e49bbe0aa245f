"""Every number of README and RESULTS is that of a kept file, and each check can fail."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_numbers  # noqa: E402
import number_blocks  # noqa: E402
import seeds as seeds_tool  # noqa: E402
from number_blocks import BLOCKS, NUMBERS, SOURCES, NumbersError  # noqa: E402

DIGIT = re.compile(r"\d")


# ------------------------------------------------------------------------------ made-up, small runs
def write_csv(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def write_record(path: Path, script: str, **changes) -> None:
    """A run.json as run_record of the scripts leaves it."""
    record = {
        "arguments": {},
        "script": script,
        "argv": [script, "--save_dir", "/home/somebody/runs"],
        "git": {"commit": "c0ffee00" * 5, "dirty": False},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
        "hardware": {"machine": "x86_64", "cpus": 2, "threads": 1, "gpu": None},
        "time": "2026-01-02T03:04:05+0000",
        "end": "2026-01-02T03:06:05+0000",
        "exit_status": 0,
        "cost": "2.0 minutes, peak 1.00 GB",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | changes))


def write_sidecar(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    Path(f"{path}.json").write_text(json.dumps({"schema": "janus.table/1", "sha256": digest}))


def write_ablation(folder: Path, runs: list[str]) -> None:
    rows = []
    for i, run in enumerate(runs):
        for mode in ("mean", "zero"):
            rows.append(
                {
                    "run": run, "mode": mode, "ranked_by": "mean", "base_loss": 4.0, "n_seq": 48,
                    "n_unit": 35, "unit": "documents",
                    "hero_layer": 3 + i, "hero_head": 1, "unique_hero": i == 0,
                    "delta": 0.04 if mode == "mean" else 9.0, "p_maxT": 0.01,
                    "crossfit": 0.03, "crossfit_lo": 0.021, "crossfit_hi": 0.039,
                    "difference": 0.004, "difference_lo": -0.011, "difference_hi": 0.019,
                    "n_linear": 480, "se_ratio": 3.0, "se_ratio_lo": 1.25, "se_ratio_hi": 5.0,
                    "n_screen": 9, "n_dropped": 240, "p_missed": 0.013, "n_needed": 1234,
                }
            )  # fmt: skip
    write_csv(folder / number_blocks.ABLATION, rows)
    write_sidecar(folder / number_blocks.ABLATION)
    ranking = {
        "run": "adaptive", "name": "L3H1", "pct_impact": 1.0, "ci_all_lo_pct": 0.9, "ci_all_hi_pct": 1.1,
        "published_head": "adaptive L9H1", "published_zero_pct_impact": 0.932,
    }  # fmt: skip
    write_csv(folder / number_blocks.TABLE_3, [ranking])
    write_record(folder / "run.json", "ablation_test.py")


def write_demo(folder: Path) -> None:
    write_ablation(folder, ["adaptive", "control"])
    for arm in ("adaptive", "control"):
        write_record(folder / arm / "run.json", "janus_adaptive.py")
        rows = []
        for i, metric in enumerate(["sigma_z", "sigma_resid", "linear_cka"]):
            value = 0.1 + i / 7 + (arm == "control") / 10
            row = {"run": arm, "layer": 0, "metric": metric, "value": value}
            rows.append(row | {"ci_lo": value - 0.01, "ci_hi": value + 0.01})
        path = folder / "activations" / arm / "topology_stats.csv"
        write_csv(path, rows)
        write_sidecar(path)
    sae = {
        "run": "adaptive", "unit": "layer", "layer": 0, "n_documents": 20, "l0": 16.2,
        "fvu": 0.123, "fvu_lo": 0.11, "fvu_hi": 0.14, "dead_share": 0.031, "dead_share_tokens": 128_000,
    }  # fmt: skip
    nulls = {}
    for gain, name in ((0.31, "gaussian"), (0.72, "decoder"), (0.53, "untrained")):
        nulls |= {
            f"gain_{name}": gain,
            f"gain_{name}_lo": gain - 0.1,
            f"gain_{name}_hi": gain + 0.1,
        }
    write_csv(folder / "saes" / "table2.csv", [sae, sae | nulls | {"layer": 5}])
    write_sidecar(folder / "saes" / "table2.csv")
    null = {"null": "untrained", "layer": 5, "fvu": 0.312, "fvu_train": 0.087}
    write_csv(folder / "saes" / "sae_nulls.csv", [null, null | {"null": "decoder", "fvu": 0.456}])
    write_sidecar(folder / "saes" / "sae_nulls.csv")
    kinds = []
    for kind, value in (("claimed", 0.91), ("matched-random", 0.23)):
        kinds.append(
            {
                "role": "hero", "run": "adaptive", "layer": 3, "head": 1, "mechanism": "keys: x",
                "kind": kind, "value": value, "ci_low": 0.8, "ci_high": 0.95, "n": 31,
                "unit": "document", "sequences": 96,
            }
        )  # fmt: skip
    write_csv(folder / number_blocks.PRESERVING, kinds)
    write_sidecar(folder / number_blocks.PRESERVING)
    write_headlines(folder, "adaptive 4.4444, control 4.3333")
    (folder / "training.png").write_bytes(b"\x89PNG")


def write_headlines(folder: Path, losses: str) -> None:
    headlines = [
        {"what": "validation loss", "number": losses},
        {"what": "SAE: FVU", "number": "adaptive 0.0777"},
    ]
    write_csv(folder / "headlines.csv", headlines)


def write_demo32(folder: Path) -> None:
    write_record(folder / "adaptive/run.json", "janus_adaptive.py")
    write_headlines(folder, "adaptive 4.4111, control 4.3222 (95 % of it); a note")


def write_seeds(folder: Path) -> None:
    """Four seeds; what seeds.py makes of them, by its own function."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(1, 5):
        for arm in ("adaptive", "control"):
            write_record(folder / f"runs/seeds/{seed}/{arm}/run.json", "janus_adaptive.py")
            for metric in seeds_tool.METRICS:
                value = rng.normal(4.4, 0.001)
                # Only the losses differ, by 0.051 to 0.054
                if metric == "val_loss":
                    value = 4.4 + (0.05 + seed / 1000) * (arm == "adaptive")
                rows.append({"seed": seed, "arm": arm, "metric": metric, "value": value})
    table = pd.DataFrame(rows)
    write_csv(folder / "results/seeds.csv", table)
    write_csv(folder / "results/seeds_summary.csv", seeds_tool.paired(table))
    loops = []
    for seed, share in zip(range(1, 5), (0.95, 0.59, 0.9, 0.97), strict=True):
        loops.append(
            {
                "seed": seed, "settled_step": 205.0, "share": share, "n": 80, "mean": 0.972,
                "sd": 0.09, "control_over_setpoint": 2.57, "hero_adaptive": "L3H0 (not unique)",
                "hero_control": "L3H4",
            }
        )  # fmt: skip
    write_csv(folder / "results/seeds_loops.csv", loops)


def write_loops32(folder: Path) -> None:
    """Two adaptive runs; the second one does not hold."""
    rows = []
    for seed, share in ((1, 0.96), (4, 0.59)):
        write_record(folder / f"{seed}/run.json", "janus_adaptive.py")
        rows.append(
            {
                "seed": seed, "dtype": "auto", "settled_step": 205.0, "n": 80, "share": share,
                "raw_share": 0.56, "noise_share": 0.99, "mean": 0.972, "sd": 0.09,
            }
        )  # fmt: skip
    write_csv(folder / "loops.csv", rows)


def write_loops(folder: Path) -> None:
    """The same, and one whose setpoint moved."""
    write_loops32(folder)
    write_record(folder / "step1/run.json", "janus_adaptive.py")
    moved = {
        "seed": 1, "step": 350, "before": 0.006, "after": 0.009, "settles_after": 45.0,
        "share": 0.93, "overshoot": 0.08,
    }  # fmt: skip
    write_csv(folder / "setpoint_steps.csv", [moved])


def write_lens(folder: Path, layers: list[int]) -> None:
    """What both Energy-Lens scripts write."""
    rows = []
    dictionaries = []
    predictors = []
    for layer in layers:
        rows.append(
            {
                "layer": layer, "n_seq": 320, "n_tokens": 10_240, "latents": 2048, "eligible": 512,
                "split_half_r": 0.9 + layer / 1000, "rule_passes": 111, "rule_false_directions": 7.5,
                "token_null": 300, "within_documents": 44, "direction_null": 55, "aligned": 33,
                "aligned_positive": 4, "aligned_clusters": 12, "aligned_participation": 9.2, "directions": 24_000, "fewest": 2,
                "median_abs_efas": 0.25, "median_ci_lo": 0.24, "median_ci_hi": 0.26,
            }
        )  # fmt: skip
        dictionaries.append({"layer": layer, "dictionary": "SAE, adam", "fvu": 0.2 + layer / 100})
        dictionaries.append(
            {"layer": layer, "dictionary": "one atom a token id + position", "fvu": 0.05}
        )
        for eps in (0.05, 1.0):
            for i, predictor in enumerate([*number_blocks.PREDICTIONS, "random"]):
                for scale in ("signed", "absolute"):
                    predictors.append(
                        {
                            "layer": layer, "eps": eps, "predictor": predictor, "scale": scale,
                            "spearman": 0.5 + i / 10 if scale == "signed" else -0.99,
                            "ci_lo": 0.31, "ci_hi": 0.87,
                            "minus_efas": 0.1, "minus_efas_lo": -0.15, "minus_efas_hi": 0.35,
                        }
                    )  # fmt: skip
    write_csv(folder / "layers.csv", rows)
    write_csv(folder / "sae.csv", dictionaries)
    write_csv(folder / "predictors.csv", predictors)


def write_energy(folder: Path) -> None:
    write_record(folder / "run.json", "energy_lens_minimal.py")
    write_lens(folder, [1, 2])
    untrained = {"layer": 2, "eligible": 296, "aligned": 0, "fewest": 3}
    write_csv(folder / "untrained.csv", [untrained])
    model = {"model": "unigram", "masked_nats": 5.42, "accuracy": 0.123, "n_masked": 2048}
    write_csv(folder / "models.csv", [model])


def write_real(folder: Path) -> None:
    write_record(folder / "run.json", "real_model_extension.py")
    write_lens(folder, [9, 18])
    row = {
        "layer": 9, "energy": "logit", "nats": 11.5, "cosine_with_true_gradient": 0.13,
        "own_change": -2.91, "final_change": -0.031,
    }  # fmt: skip
    write_csv(folder / "validity.csv", [row])


def write_smollm2(folder: Path) -> None:
    write_ablation(folder, ["pretrained"])


def write_calibration(folder: Path) -> None:
    row = {"statistic": "cross-fit interval", "setting": "n = 16, clear hero"}
    rows = [row | {"figure": "coverage", "value": 0.951}, row | {"figure": "power", "value": 0.81}]
    write_csv(folder / "calibration.csv", rows)


def write_sae_start(folder: Path) -> None:
    row = {"arch": "topk", "start": 1.0, "n_saes": 12, "n_layers": 4, "never": 0.018, "rare": 0.06}
    row |= {"never_most": 0.05, "rare_most": 0.15, "more": 0.0}
    other = {"start": 0.995, "more": -0.045, "more_lo": -0.065, "more_hi": -0.024}
    write_csv(folder / "sae_start.csv", [row])
    write_csv(folder / "compared.csv", [row, row | other])


WRITERS = {
    "demo": write_demo,
    "demo32": write_demo32,
    "seeds": write_seeds,
    "loops": write_loops,
    "loops32": write_loops32,
    "energy": write_energy,
    "real": write_real,
    "smollm2": write_smollm2,
    "sae_start": write_sae_start,
    "calibration": write_calibration,
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    """A repository in which every command has run, with documents that show it."""
    root = tmp_path_factory.mktemp("repository")
    for document in check_numbers.DOCUMENTS:
        shutil.copy(ROOT / document, root)
    shutil.copytree(ROOT / NUMBERS, root / NUMBERS)
    (root / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "results.json", root / "benchmarks")
    for name, write in WRITERS.items():
        folder = root / "runs_of" / name
        write(folder)
        assert check_numbers.collect(root, name, folder)
    # Sentences about the runs of this repository do not hold for made-up ones
    write_csv(root / NUMBERS / "claims.csv", pd.DataFrame(columns=check_numbers.CLAIMS))
    rendered = number_blocks.render_all(root)
    for document in check_numbers.DOCUMENTS:
        rewrite(root / document, lambda text: check_numbers.fix(text, rendered))
    return root


@pytest.fixture(scope="module")
def rendered(made_up) -> dict[str, str]:
    """Its blocks."""
    return number_blocks.render_all(made_up)


@pytest.fixture
def repository(made_up, tmp_path) -> Path:
    """A copy of it, to break."""
    return Path(shutil.copytree(made_up, tmp_path / "repository"))


def rewrite(path: Path, change) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def other_digit(text: str, position: int) -> str:
    """The text with another digit at a position."""
    digit = str((int(text[position]) + 1) % 10)
    return text[:position] + digit + text[position + 1 :]


# --------------------------------------------------------------------------------- this repository
def test_the_documents_say_what_the_kept_files_hold():
    assert check_numbers.check(ROOT) == []


def test_the_demo_was_kept():
    """The one run that everybody can repeat: without it this page would have nothing to show."""
    assert (ROOT / NUMBERS / "demo" / "headlines.csv").exists()


def test_the_command_says_so(capsys):
    assert check_numbers.main([]) == 0
    assert "say what the files hold" in capsys.readouterr().out


def test_nothing_is_imported_in_the_place_of_a_library():
    """tools/ comes first on the path of every tool, so a name of the standard library would hide
    it there."""
    for path in (ROOT / "tools").glob("*.py"):
        assert path.stem not in sys.stdlib_module_names


# ------------------------------------------------------------------------------------------- blocks
@pytest.mark.parametrize("name", BLOCKS)
def test_a_changed_digit_in_any_block_is_found_and_mended(name, made_up, rendered):
    document = BLOCKS[name].document
    text = (made_up / document).read_text(encoding="utf-8")
    assert check_numbers.check_blocks(document, text, rendered) == []
    match = next(m for m in check_numbers.BLOCK.finditer(text) if m["name"] == name)
    digits = [match.start("body") + digit.start() for digit in DIGIT.finditer(match["body"])]
    assert digits, "a block without a number needs no block"
    for position in digits:
        changed = other_digit(text, position)
        [problem] = check_numbers.check_blocks(document, changed, rendered)
        assert f"block {name} differs" in problem
        assert check_numbers.fix(changed, rendered) == text


@pytest.mark.parametrize("name", BLOCKS)
def test_a_removed_block_is_missed(name, made_up, rendered):
    document = BLOCKS[name].document
    text = (made_up / document).read_text(encoding="utf-8")
    match = next(m for m in check_numbers.BLOCK.finditer(text) if m["name"] == name)
    without = text.replace(match[0], "")
    [problem] = check_numbers.check_blocks(document, without, rendered)
    assert f"block {name} stands there 0 times, expected 1" in problem


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- numbers: bench -->", "<!-- number: bench -->", "without its partner"),
        ("<!-- numbers: bench -->", "<!-- numbers: speed -->", "not in tools/number_blocks.py"),
        ("<!-- numbers: bench -->", "<!-- numbers: demo-headlines -->", "1 times, expected 0"),
        ("<!-- end -->", "", "without its partner"),
    ],
)
def test_a_broken_marker_is_found(old, new, message, made_up, rendered):
    text = (made_up / "RESULTS.md").read_text(encoding="utf-8").replace(old, new, 1)
    problems = check_numbers.check_blocks("RESULTS.md", text, rendered)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "calibration"])
def test_a_missing_run_is_told_and_hides_no_old_number(name, repository):
    shutil.rmtree(repository / NUMBERS / name)
    said = number_blocks.render_all(repository).values()
    command = SOURCES[name].command
    assert any("not run yet" in text.lower() and command in text for text in said)
    problems = check_numbers.check(repository)
    assert any("differs from the kept files" in problem for problem in problems)
    assert check_numbers.main(["--root", str(repository), "--fix"]) == 0


def test_what_the_blocks_show_of_planted_files(rendered):
    """Beside values that were computed by hand."""

    def shows(name: str, *parts: str) -> None:
        for part in parts:
            assert part in rendered[name], (name, part, rendered[name])

    shows("demo-headlines", "validation loss: adaptive 4.4444, control 4.3333\nSAE: FVU")
    shows("demo-homeostat", "| validation loss | adaptive 4.4444, control 4.3333 |")
    beside = "| adaptive 4.4444, control 4.3333 | adaptive 4.4111, control 4.3222 |"
    shows("demo-elsewhere", f"| validation loss {beside}", "| bfloat16, AVX-512 | float32, AVX2 |")
    assert "SAE" not in rendered["demo-homeostat"]
    shows("demo-phases", "| 1 train, an arm | 2.0 min | 1 |", "4 ablation, both arms | 2.0 min")
    shows("demo-topology", "| 0 | 0.2 [0.19, 0.21] -> 0.1 [0.09, 0.11] |")
    shows(
        "demo-saes",
        "| adaptive | 0 | 0.123 [0.110, 0.140], 20 documents | 16.2 | 3.1% (on 128,000 tokens) |",
    )
    nulls = "31% [21%, 41%] | 72% [62%, 82%] | 53% [43%, 63%]"
    shows("demo-nulls", f"| adaptive | 5 | {nulls} |")
    assert "| adaptive | 0 |" not in rendered["demo-nulls"]
    shows("demo-nulls", "0.312 on these documents, 0.087 on those that it was trained on.")
    shows(
        "sae-start", "| topk | anywhere | 1.80% (5.00%) | 6.00% (15.00%) | 0, 4 layers, 12 SAEs |"
    )
    shows("sae-start", "| topk | 99.5% | 1.80% ", "| -4.5% [-6.5%, -2.4%], 4 layers, 12 SAEs |")
    # 0.04 of 4 nats under mean ablation; not the 9 of zero ablation
    shows(
        "demo-hero",
        "| adaptive | L3H1 | yes | +1.00% | +0.0300 [+0.0210, +0.0390] | 0.01 "
        "| 35 documents, 48 sequences |",
    )
    shows("demo-hero", "+0.0040 [-0.0110, +0.0190]", "is neither shown nor excluded")
    shows(
        "demo-mechanism",
        "L3H1 of adaptive",
        "| keys: x | 91% [80%, 95%] | 23% | 96 sequences of 31 documents |",
    )
    # 0.95, 0.9 and 0.97, not 0.59
    shows("seeds-loops", "| 2 | 205 | 59% (80) |", "on 3 of 4 seeds")
    differences = "| +0.051 | +0.052 | +0.053 | +0.054 | 4 of 4 |"
    shows("loops-held", "| 4 | 205 | 59% (80) | 56% | 99% |", "on 1 of 2 seeds")
    shows("loops-steps", "| 1 | 0.006 -> 0.009 at step 350 | 45 steps | 8% | 93% |")
    shows("seeds-each", f"| validation loss, nats a token {differences}")
    shows("seeds-summary", "| validation loss, nats a token | 4 | ", " | 4.4 | +0.0525 [")
    brief = rendered["seeds-brief"]
    told, untold = brief.split("Not told from zero")
    assert "Over 4 seeds" in told and "validation loss, nats a token +0.0525 [" in told
    assert "Gini" in untold and "validation loss" not in untold
    # Two layers of 33 features in 12 clusters
    shows("energy-lens", "| **66, in 24 clusters of copies**, worth 18 directions; 8 amplifying |")
    shows("energy-lens", "| 0 of 296 (step 2; fewest 3) | not measured |")
    shows("energy-lens", "| 0.21 to 0.22; 0.05 | 0.29 to 0.38; 0.05 |")
    shows("energy-lens", "| slight ablation, Spearman: EFAS, other half | 0.50 [0.31, 0.87], 0.50")
    shows(
        "energy-lens", "| full ablation: attribution minus EFAS, other half | +0.10 [-0.15, +0.35]"
    )
    shows("energy-layers", "| 1 | 512 | 300 | 55 | 33 | 12 | 9 | 0.250 [0.240, 0.260] |")
    shows("energy-models", "| unigram | 5.42 | 12.3% | 2,048 |")
    shows("real-validity", "| 9 | logit | 11.50 | 0.13 | -2.910 | -0.031 |")
    shows("smollm2-hero", "| pretrained | L3H1 | yes |")
    in_setting = "(n = 16, clear hero)"
    shows("calibration", f"| coverage | 1 | 0.951 {in_setting} | 0.951 {in_setting} |")
    shows("where-from", "| `make seeds` | 2026-01-02 | c0ffee00 |", "| 2.13.0 |")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.002, "shown here"),
        (-0.01, 0.018, "neither shown nor excluded"),
        (-0.01, 0.017, "not shown, and one as large as published is excluded here"),
        (-0.02, -0.01, "contradicted here"),
    ],
)
def test_the_verdict_on_a_published_difference(low, high, verdict):
    assert number_blocks.direction(low, high, 0.018, "here") == verdict


@pytest.mark.parametrize(
    ("command", "phase"),
    [
        ("train_sae.py --runs adaptive --layers 1 2 4", "3 SAEs, an arm"),
        ("train_sae.py --runs control --layers 5 --nulls", "3 SAEs with their nulls, an arm"),
        ("train_sae.py --arch relu --unit head", "3 SAEs of single heads, both arms"),
        ("train_sae.py --runs untrained", "3 SAEs of the model before training"),
        ("harvest_activations.py --run_name adaptive", "2 harvest, an arm"),
        ("harvest_activations.py --run_name untrained", "2 harvest of the model before training"),
        ("other.py", ""),
    ],
)
def test_which_phase_a_command_is(command, phase):
    argv = command.split()
    assert number_blocks.phase_of(pd.Series({"script": argv[0], "argv": argv})) == phase


def test_the_saes_of_the_demo_are_those_of_layers(repository):
    path = repository / NUMBERS / "demo" / "saes" / "table2.csv"
    kept = number_blocks.Kept(repository)
    before = number_blocks.demo_saes(kept)
    table = pd.read_csv(path)
    pd.concat([table, table.assign(unit="head", fvu=0.045)]).to_csv(path, index=False)
    assert number_blocks.demo_saes(kept) == before


def test_a_renamed_column_is_one_line(repository, capsys):
    path = repository / NUMBERS / "demo" / "saes" / "table2.csv"
    rewrite(path, lambda text: text.replace("dead_share,", "silent,"))
    assert check_numbers.main(["--root", str(repository)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "table2.csv has no column dead_share;" in error


# ------------------------------------------------------------------------------------------ collect
def csvs(repository: Path) -> list[Path]:
    found = []
    for name in SOURCES:
        found += sorted((repository / NUMBERS / name).rglob("*.csv"))
    return found


def test_a_changed_byte_in_any_kept_file_is_found(repository):
    for path in csvs(repository):
        before = path.read_bytes()
        place = DIGIT.search(before.decode()).start()
        path.write_bytes(other_digit(before.decode(), place).encode())
        [problem] = check_numbers.check_kept(repository)
        assert str(path) in problem
        path.write_bytes(before)
    (repository / NUMBERS / "demo" / "extra.csv").write_text("by hand\n1\n")
    [problem] = check_numbers.check_kept(repository)
    assert "extra.csv" in problem


def test_a_changed_number_in_a_kept_file_changes_a_block(repository):
    """Even if somebody also forges the hash."""
    path = repository / NUMBERS / "demo" / "headlines.csv"
    rewrite(path, lambda text: text.replace("4.4444", "4.4445"))
    provenance = path.with_name("provenance.json")
    record = json.loads(provenance.read_text())
    record["files"]["headlines.csv"] = hashlib.sha256(path.read_bytes()).hexdigest()
    provenance.write_text(json.dumps(record))
    problems = check_numbers.check(repository)
    assert len(problems) == 3  # the headlines stand in three blocks
    assert "block demo-headlines differs" in problems[0]
    assert "block demo-elsewhere differs" in problems[1]
    assert "block demo-homeostat differs" in problems[2]


def test_a_second_collection_leaves_nothing_of_the_first(repository):
    folder = repository / "runs_of" / "demo"
    shutil.rmtree(folder / "activations" / "control")
    old = repository / NUMBERS / "demo" / "activations" / "control"
    assert old.exists()
    check_numbers.collect(repository, "demo", folder)
    assert not old.exists()


def test_kept_files_are_the_bytes_of_the_run_and_name_no_folder(made_up):
    for path in csvs(made_up):
        name, *rest = path.relative_to(made_up / NUMBERS).parts
        assert path.read_bytes() == made_up.joinpath("runs_of", name, *rest).read_bytes()
    for name in SOURCES:
        text = (made_up / NUMBERS / name / "provenance.json").read_text()
        assert "somebody" not in text and str(made_up) not in text


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda f: (f / "headlines.csv").unlink(), "has no headlines.csv; run make demo"),
        (lambda f: (f / "saes/table2.csv.json").unlink(), "has no sidecar table2.csv.json"),
        (
            lambda f: rewrite(f / "saes/table2.csv", lambda text: text.replace("0.123", "0.122")),
            "is not what table2.csv.json describes",
        ),
        (
            lambda f: write_record(f / "control/run.json", "janus_adaptive.py", exit_status=1),
            "exit status 1, expected 0",
        ),
        (
            lambda f: write_record(f / "control/run.json", "janus_adaptive.py", exit_status=None),
            "exit status None, expected 0",
        ),
        (
            # As a file that was there before a run of its folder began
            lambda f: os.utime(f / "headlines.csv", (1, 1)),
            "headlines.csv is older than the run of",
        ),
        (lambda f: [path.unlink() for path in f.rglob("run.json")], "has no **/run.json"),
    ],
)
def test_what_is_refused_leaves_what_was_kept(breaking, message, repository, capsys):
    folder = repository / "runs_of" / "demo"
    breaking(folder)
    assert check_numbers.main(["--root", str(repository), "--collect", f"demo={folder}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert check_numbers.check(repository) == []


def test_without_names_only_what_has_run_is_collected(repository, capsys):
    shutil.rmtree(repository / NUMBERS / "energy")
    shutil.copytree(repository / "runs_of" / "energy", repository / "energy_lens_results")
    assert check_numbers.main(["--root", str(repository), "--collect", "--fix"]) == 0
    said = capsys.readouterr().out
    assert "energy: kept" in said and "demo: nothing" in said
    assert check_numbers.main(["--root", str(repository), "--collect", "else=runs"]) == 1
    assert "expected NAME=FOLDER" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- sentences
def with_sentence(repository: Path, sentence: str) -> list[str]:
    """What is said of RESULTS.md with a sentence more."""
    text = (repository / "RESULTS.md").read_text(encoding="utf-8")
    return check_numbers.check_sentences(repository, "RESULTS.md", f"{text}\n{sentence}\n")


@pytest.mark.parametrize(
    "sentence",
    [
        "The loss is 4.44 nats.",
        "It falls by .012 nats.",
        "It costs 3 % of the loss.",
        "It costs 3\n% of the loss.",
        "It costs 12% of the loss.",
        "The interval is [-1, 1.5].",
        "In all 928 features are aligned.",
        "In all 1,652 features pass.",
        "There are 0 of them.",
        "It holds on 3 of 4 seeds.",
        "It is 2x as fast.",
        "It is 2 times as fast.",
        "- item of a list: 17",
        "| a table by hand | 17 |",
        "It is 1e-6.",
    ],
)
def test_a_number_that_nobody_claims_is_found(sentence, made_up):
    problems = with_sentence(made_up, sentence)
    assert problems and all("no file has the number" in problem for problem in problems)


@pytest.mark.parametrize(
    "sentence",
    [
        "Phases 2, 4 and 5 of L3H1 in bfloat16 on GPT-2, not v0.3.",
        "The flag `--target_sigma 0.009` of [a page](page-0.12.html).",
        "```\n0.12\n```",
        "## 928",
        "a formula:\n\n    x = 0.12\n",
        "95 % intervals",
    ],
)
def test_what_is_no_result_may_stand(sentence, made_up):
    assert with_sentence(made_up, sentence) == []


def claim(repository: Path, phrase: str, /, **changes) -> None:
    """Adds a row to claims.csv; by default about the FVU of the SAE, 0.123."""
    row = {
        "document": "RESULTS.md", "phrase": phrase, "file": "demo/saes/table2.csv",
        "row": "run == 'adaptive' and layer == 0", "column": "fvu", "tolerance": "", "why": "",
    }  # fmt: skip
    path = repository / NUMBERS / "claims.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    write_csv(path, pd.concat([rows, pd.DataFrame([row | changes])]))


@pytest.mark.parametrize(
    ("sentence", "holds"),
    [
        ("The SAE leaves 0.12 of it.", True),
        ("The SAE\nleaves 0.12\nof it.", True),
        ("The SAE leaves 0.13 of it.", False),
        ("The SAE leaves 1.12 of it.", False),
        ("The SAE leaves 0.12 % of it.", False),
    ],
)
def test_a_claimed_number_is_that_of_its_file(sentence, holds, repository):
    claim(repository, "SAE leaves {:.2f} of it")
    problems = with_sentence(repository, sentence)
    if holds:
        assert problems == []
    else:
        assert len(problems) == 1 and "expected 'SAE leaves 0.12 of it'" in problems[0]


def test_a_claimed_share_may_be_a_percentage(repository):
    claim(repository, "leaves {:.0%} unexplained")
    assert with_sentence(repository, "It leaves 12 % unexplained.") == []
    assert with_sentence(repository, "It leaves 13 % unexplained.") != []


def test_a_tolerance_counts_in_units_of_the_file_and_needs_a_reason(repository):
    claim(repository, "leaves {:.2f} of it", tolerance="0.02", why="machines round differently")
    assert with_sentence(repository, "It leaves 0.14 of it.") == []
    assert with_sentence(repository, "It leaves 0.15 of it.") != []
    claim(repository, "leaves {:.3f} of it", tolerance="0.02")
    with pytest.raises(NumbersError, match="tolerance without a reason"):
        with_sentence(repository, "It leaves 0.14 of it.")


def test_a_claim_covers_its_number_only(repository):
    claim(repository, "leaves {:.2f} of 17 parts")
    [problem] = with_sentence(repository, "It leaves 0.12 of 17 parts.")
    assert "no file has the number '17'" in problem


def test_a_claim_whose_sentence_is_gone_is_found(repository):
    claim(repository, "SAE leaves {:.2f} of it")
    [problem] = with_sentence(repository, "Nothing is said of it.")
    assert "the sentence of a claim is gone" in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "demo/nothing.csv"}, "was not collected; delete the sentence"),
        ({"column": "nothing"}, "has no such number"),
        ({"row": "nothing == 1"}, "has no such number"),
        ({"column": "run"}, "has no such number"),
        ({"row": "layer == 7"}, "0 rows of"),
        ({"file": f"demo/{number_blocks.ABLATION}", "row": "", "column": "delta"}, "4 rows of"),
        ({"phrase": "no number"}, "needs one number in braces"),
        ({"phrase": "{:.1f} and {:.1f}"}, "needs one number in braces"),
    ],
)
def test_a_claim_that_cannot_be_checked_is_an_error(changes, message, repository):
    claim(repository, "SAE leaves {:.2f} of it", **changes)
    with pytest.raises(NumbersError, match=re.escape(message)):
        with_sentence(repository, "The SAE leaves 0.12 of it.")


def test_an_allowance_that_nothing_needs_is_found(repository):
    path = repository / NUMBERS / "allowed.csv"
    allowed = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows = [
        {"document": "RESULTS.md", "phrase": "17 of the original study", "why": "published"},
        {"document": "RESULTS.md", "phrase": "19 of the original study", "why": ""},
    ]
    write_csv(path, pd.concat([allowed, pd.DataFrame(rows)]))
    problems = with_sentence(repository, "The 19 of the original study.")
    assert len(problems) == 2
    assert "nothing needs the allowance of '17" in problems[0]
    assert "'19 of the original study' without a reason" in problems[1]
