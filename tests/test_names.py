"""Names, places, systems and numbers as newcomers have them: none of them may be taken for something else."""

import html.parser
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ablation_test as ablation
import energy_lens_minimal as lens
import harvest_activations as harvest
import hero_head_analysis as hero
import janus_adaptive as janus
import real_model_extension as real
import train_sae as sae

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]
import seeds  # noqa: E402
from test_seeds import write as plant_seed  # noqa: E402

SCRIPTS = [janus, harvest, sae, ablation, hero, lens]
NAMES = [
    "lr=$3e^$-x",
    "_hidden",
    "a|b",
    "<b>bold</b>",
    "50%_$\\frac",
    "*star* `code`",
    "runs[1]",
    "$x$ & {y}",
    "_$^_",
]


def error_of(capsys) -> str:
    """The one line of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and "Traceback" not in "\n".join(lines)
    return lines[-1]


# ---------------------------------------------------------------------------------------- names as text
def pixels(text: str, parse_math: bool) -> np.ndarray:
    figure = Figure(figsize=(4, 1))
    canvas = FigureCanvasAgg(figure)
    figure.text(0.1, 0.5, text, parse_math=parse_math)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("name", NAMES)
def test_a_label_looks_as_the_name_does_without_mathematics(name):
    label = janus.as_label(name)
    assert label.strip() == name.replace("$", "\\$")
    assert np.array_equal(pixels(label, True), pixels(label.replace("\\$", "$"), False))


def legends(monkeypatch) -> list[list[str]]:
    """From now on: the legend of every panel that is closed."""
    seen = []

    def close(figure="all"):
        for ax in getattr(figure, "axes", []):
            if ax.get_legend():
                seen.append([text.get_text() for text in ax.get_legend().get_texts()])

    monkeypatch.setattr(plt, "close", close)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_a_training_folder_of_any_name_is_drawn_and_in_the_legend(
    name, smoke_checkpoint, tmp_path, monkeypatch
):
    name = name.replace("/", "-")  # of a folder
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(smoke_checkpoint.parent / "telemetry.csv", folder)
    seen = legends(monkeypatch)
    csv = str(folder / "telemetry.csv")
    assert janus.main(["--redraw", csv, csv, "--save_dir", str(folder)]) == 0
    assert (folder / "training.png").stat().st_size > 10_000
    assert [janus.as_label(name)] * 2 == seen[0]


class Cells(html.parser.HTMLParser):
    """What a reader of HTML sees of a cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.seen += data

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_markdown_table_is_text(name):
    """Rendered by markdown-it, a CommonMark parser of its own, with tables."""
    markdown_it = pytest.importorskip("markdown_it")
    table = pd.DataFrame({"run": [name], "l0": [0.5], "mse_lo": [1.0]})
    for text in (ablation.as_markdown(table), lens.markdown_table(table) + "\n"):
        page = markdown_it.MarkdownIt("commonmark").enable("table").render(text)
        row = page.partition("<tbody>")[2]
        cell = Cells(row.partition("<td>")[2].partition("</td>")[0])
        assert row.count("<td>") == 3 and not cell.tags
        assert cell.seen == name


def test_markdown_text_keeps_the_names_of_columns_and_intervals():
    assert janus.markdown_text("ce_recovered_zero") == "ce_recovered_zero"
    assert janus.markdown_text("0.5 [0.4, 0.6]") == "0.5 [0.4, 0.6]"
    assert "$" not in janus.markdown_text("$3e^$") and "|" not in janus.markdown_text("a|b")


@pytest.mark.parametrize("name", ["lr=$3e^$-x", "007", "nan", "_x_|y"])
def test_sae_tables_of_a_run_of_any_name(name, tmp_path):
    """A run is a folder, so its name may look like a number or like nothing; two of them stay two."""
    rows = []
    for run in (name, "other"):
        folder = tmp_path / run / "L0"
        folder.mkdir(parents=True)
        latents = pd.DataFrame({"frequency": [0.1, 0.5], "n_rows": [100, 100]})
        latents.to_csv(folder / "latent_frequencies.csv", index=False)
        row = dict(run=run, unit="layer", arch="batchtopk", site="z", layer=0, head=math.nan)
        numbers = dict.fromkeys(["l0", "mse", "fvu"], 0.5)
        ends = {f"{key}_{end}": 0.5 for key in numbers for end in ("lo", "hi")}
        dead = dict(dead_share=0.1, dead_share_tokens=100, n_documents=5, split="train")
        rows.append(row | numbers | ends | dead | {"folder": f"{run}/L0"})
    pd.DataFrame(rows).to_csv(tmp_path / "sae_metrics.csv", index=False)
    assert sae.main(["--redraw", "--save_dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "table2.csv", dtype=str, keep_default_na=False)
    assert sorted(table["run"]) == sorted([name, "other"])
    assert (tmp_path / "figure2_l0_by_depth.png").stat().st_size > 10_000


@pytest.mark.parametrize("run", ["007", "nan", "1e3"])
def test_a_run_name_that_looks_like_a_number_stays_one_in_figure_1(run, tmp_path):
    rows = [dict(run=run, layer=0, head_i=0, head_j=1, cosine=0.1, split="train", n_tokens=64)]
    csv = tmp_path / "head_cosines.csv"
    pd.DataFrame(rows).to_csv(csv, index=False)
    assert harvest.side_by_side([csv])["run"].tolist() == [run]
    harvest.draw_cosines([csv], tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5_000


# --------------------------------------------------------------------------------- numbers as float() reads them
@pytest.mark.parametrize("text", ["1e3", "1E-3", "+.5", "1_000", " 2 ", "0", "1e+2"])
def test_pressure_takes_what_float_takes(text):
    args = janus.parse_args(["--preset", "smoke", "--pressure", f"constant:{text}"])
    assert janus.Pressure(args).weights(1) == [float(text)]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "", "1e", "²", "1,5"])
def test_pressure_refuses_what_is_no_weight(text, capsys):
    with pytest.raises(SystemExit) as stop:
        janus.parse_args(["--preset", "smoke", "--pressure", f"constant:{text}"])
    assert stop.value.code == 2 and "a number from 0" in error_of(capsys)


REALS = ["--k_p", "--k_i", "--k_d", "--lambda_start", "--weight_decay", "--filter_beta"]


@pytest.mark.parametrize("flag", [*REALS, "--dropout", "--learning_rate", "--target_sigma"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_no_flag_takes_nan_or_infinity(flag, text, capsys):
    with pytest.raises(SystemExit) as stop:
        janus.parse_args(["--preset", "smoke", f"{flag}={text}"])
    assert stop.value.code == 2 and flag in error_of(capsys)


@pytest.mark.parametrize(("text", "number"), [("1e3", 1000), ("5", 5), ("2_000", 2000), ("4.0", 4)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_numbers_may_be_written_with_an_exponent(script, text, number):
    found = script.positive(int)(text)
    assert found == number and isinstance(found, int)


@pytest.mark.parametrize("text", ["2.5", "many", "0x10", "1e400", "-3", "0", "nan"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises((ValueError, janus.argparse.ArgumentTypeError)):
        janus.positive(int)(text)


def test_a_tokenizer_size_in_other_digits_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        janus.parse_args(["--preset", "smoke", "--tokenizer", "train:5²"])
    assert stop.value.code == 2 and "train:N" in error_of(capsys)


# ------------------------------------------------------------------------------------- calls that one system has
# What Linux has and macOS or Windows lack. A script that mentions another one must be looked at here.
MODULES = ["fcntl", "resource", "pwd", "grp", "termios"]
CALLS = ["posix_fallocate", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "getloadavg"]
CALLS += ["getuid", "geteuid", "wait4", "mkfifo", "memfd_create", "copy_file_range", "sendfile"]
ELSEWHERE = f"""
import os, runpy, sys
import torch, pandas, tokenizers, matplotlib.pyplot, seaborn, scipy.stats, safetensors.torch, tqdm, jinja2
for name in {MODULES}: sys.modules[name] = None
for name in {CALLS}:
    if hasattr(os, name): delattr(os, name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {MODULES} else find(name, *more)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_elsewhere(script, *argv) -> subprocess.CompletedProcess:
    """A script on a system without the calls."""
    command = [sys.executable, "-c", ELSEWHERE, script.__file__, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_every_phase_runs_without_the_calls_of_one_system(
    smoke_args, smoke_checkpoint, cache_dir, tmp_path
):
    run_elsewhere(janus, *smoke_args, "--steps", 10, "--save_dir", tmp_path / "a")
    text = ["--cache_dir", cache_dir]
    dumps = ["--layers", 3, "--tokens", 8192, "--save_dir", tmp_path / "acts", *text]
    run_elsewhere(harvest, "--model_path", smoke_checkpoint, *dumps)
    places = ["--activations_dir", tmp_path / "acts", "--save_dir", tmp_path / "saes"]
    run_elsewhere(sae, *places, "--steps", 5, "--batch_size", 256, *text)
    assert (tmp_path / "saes" / "table2.md").is_file()
    csv = tmp_path / "results.csv"
    heads = ["--layers", 3, 6, "--n_seqs", 8, "--bootstrap", 100, "--mode", "mean"]
    run_elsewhere(ablation, "--adaptive_model", smoke_checkpoint, *heads, "--save_file", csv, *text)
    saved = ["--activations_dir", tmp_path / "acts", "--saes_dir", tmp_path / "saes"]
    run_elsewhere(
        hero, "--ablation_csv", csv, "--save_dir", tmp_path / "h", "--n_seqs", 8, *saved, *text
    )
    assert (tmp_path / "h" / "hero_report.html").is_file()


def test_memory_is_left_out_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(lens, "find_spec", lambda name: None)
    assert math.isnan(lens.peak_gb()) and "peak" not in lens.cost_line(0.0)


@pytest.mark.parametrize("file", sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]), ids=str)
def test_no_script_imports_what_another_system_lacks(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    imported = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    assert not set(imported) & set(MODULES)


@pytest.mark.parametrize("number", ["EOPNOTSUPP", "EINVAL", "ENOSPC"])
def test_a_disk_that_cannot_reserve_is_used_and_a_full_one_is_not(number, tmp_path, monkeypatch):
    code = getattr(harvest.errno, number)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with open(tmp_path / "f", "wb") as f:
        if number == "ENOSPC":
            with pytest.raises(OSError):
                harvest.fill_holes(f.fileno(), 10)
        else:
            harvest.fill_holes(f.fileno(), 10)


# ------------------------------------------------------------------------------------- content, not place
@pytest.fixture
def pair(smoke_checkpoint, cache_dir, tmp_path, monkeypatch):
    """A run as a user has it: named from its own folder, ablated, harvested."""
    home = tmp_path / "home"
    shutil.copytree(smoke_checkpoint.parent, home / "model")
    monkeypatch.chdir(home)
    heads = ["--layers", "3", "6", "--n_seqs", "8", "--bootstrap", "100", "--mode", "mean"]
    argv = [
        "--adaptive_model",
        "model/janus_adaptive_final.pt",
        *heads,
        "--cache_dir",
        str(cache_dir),
    ]
    assert ablation.main([*argv, "--save_file", "results.csv"]) == 0
    dumps = ["--layers", "3", "--tokens", "8192", "--cache_dir", str(cache_dir)]
    assert harvest.main(["--model_path", "model/janus_adaptive_final.pt", *dumps]) == 0
    return home


def study(home: Path, out: Path, cache_dir: Path, *more: str) -> int:
    argv = ["--ablation_csv", str(home / "results.csv"), "--save_dir", str(out), "--n_seqs", "8"]
    return hero.main([*argv, "--cache_dir", str(cache_dir), *more])


def test_checkpoints_are_found_by_what_they_hold(pair, cache_dir, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    # From another folder
    assert study(pair, tmp_path / "h1", cache_dir) == 0
    # Moved together with its neighbours
    moved = tmp_path / "moved"
    pair.rename(moved)
    assert study(moved, tmp_path / "h2", cache_dir) == 0
    places = ["--activations_dir", str(moved / "activations"), "--save_dir", str(tmp_path / "saes")]
    assert (
        sae.main([*places, "--steps", "5", "--batch_size", "256", "--cache_dir", str(cache_dir)])
        == 0
    )
    assert "CE recovered" in capsys.readouterr().out
    # The model alone moved: one line, and the flag that says where
    (moved / "model").rename(tmp_path / "models")
    capsys.readouterr()
    assert study(moved, tmp_path / "h3", cache_dir) == 1
    line = error_of(capsys)
    assert "does not exist" in line and "--model_path" in line
    model = tmp_path / "models" / "janus_adaptive_final.pt"
    assert study(moved, tmp_path / "h3", cache_dir, "--model_path", str(model)) == 0
    # Another file in its place is not it
    wrong = tmp_path / "models" / "ckpt_00000020.pt"
    assert study(moved, tmp_path / "h4", cache_dir, "--model_path", str(wrong)) == 1
    line = error_of(capsys)
    assert f"--model_path {wrong} has sha256" in line and "was measured on: adaptive" in line
    # Nor is it ignored where the right one is found without it
    (tmp_path / "models").rename(moved / "model")
    assert (
        study(moved, tmp_path / "h5", cache_dir, "--model_path", str(moved / "model" / wrong.name))
        == 1
    )
    assert "has sha256" in error_of(capsys)
    assert study(moved, tmp_path / "h6", cache_dir, "--model_path", "nowhere.pt") == 1
    assert "nowhere.pt is not a file" in error_of(capsys)


def test_a_text_that_moved_with_the_checkpoint_is_found(
    smoke_args, cache_dir, tmp_path, monkeypatch
):
    first = tmp_path / "first"
    (first / "texts").mkdir(parents=True)
    text = Path(smoke_args[smoke_args.index("--dataset") + 1])
    shutil.copy(text, first / "texts" / "own.txt")
    changed = ["--dataset", str(first / "texts" / "own.txt"), "--steps", "5"]
    assert janus.main([*smoke_args, *changed, "--save_dir", str(first / "m")]) == 0
    first.rename(tmp_path / "second")
    model = tmp_path / "second" / "m" / "janus_adaptive_final.pt"
    dumps = ["--layers", "3", "--tokens", "4096", "--save_dir", str(tmp_path / "acts")]
    argv = ["--model_path", str(model), *dumps, "--cache_dir", str(cache_dir)]
    assert harvest.main(argv) == 0


def interrupted(smoke_args, folder: Path) -> list[str]:
    """Trains, and leaves the folder as a run that was killed after its checkpoint of step 20."""
    argv = [*smoke_args, "--save_dir", str(folder)]
    assert janus.main(argv) == 0
    for path in folder.glob("janus_*"):
        path.unlink()
    return argv


def test_resume_goes_by_what_a_text_holds(smoke_args, tmp_path, capsys):
    argv = interrupted(smoke_args, tmp_path / "run")
    place = smoke_args.index("--dataset") + 1
    copy = tmp_path / "another_name.txt"
    shutil.copy(smoke_args[place], copy)
    moved = [*argv, "--dataset", str(copy)]
    assert janus.main([*moved, "--resume"]) == 0
    assert "resumed" in capsys.readouterr().out
    # The same name with another content is refused, though nothing that was typed has changed
    for path in (tmp_path / "run").glob("janus_*"):
        path.unlink()
    changed = tmp_path / "changed.txt"
    changed.write_text(copy.read_text(encoding="utf-8") + "more\n" * 2000, encoding="utf-8")
    tokenizer = ["--tokenizer", str(tmp_path / "run" / "tokenizer.json")]
    assert janus.main([*argv, "--dataset", str(changed), *tokenizer, "--resume"]) == 1
    assert "--dataset" in error_of(capsys)


def test_one_repository_of_the_hub_holds_two_texts(tmp_path, monkeypatch):
    keys = [janus.dataset_key(name) for name in janus.HUB_DATASETS]
    assert len({janus.text_identity(key) for key in keys}) == 2
    texts = []
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("The same.", encoding="utf-8")
        texts.append(janus.text_identity(janus.dataset_key(str(tmp_path / name))))
    (tmp_path / "three.txt").write_text("Another.", encoding="utf-8")
    texts.append(janus.text_identity(janus.dataset_key(str(tmp_path / "three.txt"))))
    assert texts[0] == texts[1] != texts[2]


def test_a_harvest_of_a_renamed_text_goes_on(smoke_args, smoke_checkpoint, tmp_path, capsys):
    text = Path(smoke_args[smoke_args.index("--dataset") + 1])
    renamed = tmp_path / "renamed.txt"
    shutil.copy(text, renamed)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + "more\n" * 2000, encoding="utf-8")
    cache = smoke_args[smoke_args.index("--cache_dir") :][:2]
    argv = ["--model_path", str(smoke_checkpoint), "--tokens", "8192"]
    argv += [*cache, "--save_dir", str(tmp_path / "acts")]
    assert harvest.main([*argv, "--layers", "3"]) == 0
    capsys.readouterr()
    assert harvest.main([*argv, "--layers", "6", "--dataset", str(renamed)]) == 0
    assert "was trained on" not in capsys.readouterr().out
    assert (tmp_path / "acts" / "adaptive" / "L6.z.npy").is_file()
    # Another content is another text, and cannot join
    assert harvest.main([*argv, "--layers", "7", "--dataset", str(other)]) == 1
    assert "dataset_key" in error_of(capsys)


def test_resume_of_a_replay_goes_by_the_telemetry(smoke_args, smoke_checkpoint, tmp_path, capsys):
    csv = tmp_path / "t.csv"
    shutil.copy(smoke_checkpoint.parent / "telemetry.csv", csv)
    argv = interrupted([*smoke_args, "--pressure", f"replay:{csv}"], tmp_path / "run")
    csv.rename(tmp_path / "moved.csv")
    again = [*argv, "--pressure", f"replay:{tmp_path / 'moved.csv'}", "--resume"]
    assert janus.main(again) == 0
    for path in (tmp_path / "run").glob("janus_*"):
        path.unlink()
    table = pd.read_csv(tmp_path / "moved.csv")
    table.assign(**{"lambda": 0.5}).to_csv(tmp_path / "moved.csv", index=False)
    assert janus.main(again) == 1 and "--pressure" in error_of(capsys)


# ------------------------------------------------------------------------------------- look, then say
def test_divergence_names_the_checkpoint_that_is_there_or_none(tmp_path, smoke_checkpoint):
    args = janus.parse_args(["--preset", "smoke", "--save_dir", str(tmp_path)])
    with pytest.raises(janus.HandoffError, match="no checkpoint was written yet"):
        janus.refuse_divergence(3, math.nan, 1.0, args)
    for path in smoke_checkpoint.parent.glob("ckpt_*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(janus.HandoffError, match=r"the last checkpoint is \S+ckpt_00000020.pt"):
        janus.refuse_divergence(30, math.inf, 1.0, args)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_resume_goes_on_from_the_newest_checkpoint_that_can_be_read(smoke_args, tmp_path, capsys):
    argv = interrupted(smoke_args, tmp_path)
    cut(tmp_path / "ckpt_00000020.pt")
    assert janus.main([*argv, "--resume"]) == 0
    out = capsys.readouterr().out
    assert (
        "ckpt_00000020.pt has" in out and "ckpt_00000010.pt is the newest that can be read" in out
    )
    # A final checkpoint that was cut is not complete
    cut(tmp_path / "janus_adaptive_final.pt")
    assert janus.main([*argv, "--resume"]) == 0
    assert "it is made again" in capsys.readouterr().out
    final = tmp_path / "janus_adaptive_final.pt"
    assert janus.sha256(final) == json.loads(Path(f"{final}.json").read_text())["sha256"]
    assert janus.main([*argv, "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_a_broken_checkpoint_is_remade_from_the_one_before_it(smoke_checkpoint, tmp_path):
    shutil.copytree(smoke_checkpoint.parent, tmp_path / "m")
    final = tmp_path / "m" / "janus_adaptive_final.pt"
    cut(final)
    with pytest.raises(janus.HandoffError, match="--resume, which goes on from ckpt_00000020.pt"):
        janus.load_checkpoint(final, torch.device("cpu"), False)
    # --resume would make no file of another name, nor one of an earlier step
    for name in ("best.pt", "ckpt_00000005.pt"):
        with pytest.raises(
            janus.HandoffError, match="does not exist.*janus_adaptive.py --save_dir DIR"
        ):
            janus.load_checkpoint(tmp_path / "m" / name, torch.device("cpu"), False)
    for path in (tmp_path / "m").glob("ckpt_*"):
        path.unlink()
    with pytest.raises(janus.HandoffError, match="python janus_adaptive.py --save_dir DIR"):
        janus.load_checkpoint(final, torch.device("cpu"), False)


def test_the_probe_says_whose_fault_it_is(smoke_checkpoint, tmp_path, monkeypatch):
    shutil.copytree(smoke_checkpoint.parent, tmp_path / "m")
    final = tmp_path / "m" / "janus_adaptive_final.pt"
    # Another weight in the file: its bytes are others than those that were finished
    ckpt = torch.load(final, weights_only=True)
    ckpt["model"]["blocks.0.w_down.weight"] += 1.0
    torch.save(ckpt, final)
    side = json.loads(janus.sidecar_path(final).read_text())
    janus.write_json(janus.sidecar_path(final), side | {"bytes": final.stat().st_size})
    with pytest.raises(janus.HandoffError, match="its bytes are not those that its sidecar"):
        janus.load_checkpoint(final, torch.device("cpu"), False)
    # The model in the script was edited: the file is whole
    monkeypatch.setattr(janus.F, "silu", torch.relu)
    with pytest.raises(janus.HandoffError, match="is not the one that was trained"):
        janus.load_checkpoint(smoke_checkpoint, torch.device("cpu"), False)


def test_no_advice_names_a_flag_that_a_script_lacks(capsys):
    """Out of memory: hero and Energy-Lens have no --batch_size."""

    def too_large():
        raise MemoryError("x")

    for script in SCRIPTS:
        assert script.one_line_errors(too_large) == 1
        assert "--batch_size" not in error_of(capsys)


def test_an_os_error_says_nothing_about_other_files(capsys):
    def missing():
        raise FileNotFoundError(2, "No such file or directory", "gone")

    def full():
        raise OSError(28, "No space left on device", "f")

    for script in SCRIPTS:
        assert script.one_line_errors(missing) == 1
        assert error_of(capsys).endswith("No such file or directory: gone")
        assert script.one_line_errors(full) == 1
        assert "make room" in error_of(capsys)


# ------------------------------------------------------------------------------------- work finished, picture lost
def broken(*_args, **_more):
    raise RuntimeError("no font")


def lost_picture(script, argv, run_json: Path, capsys, *kept: str) -> str:
    """Runs a script whose figures fail -> its one line. Status 1 in both places; the data are there."""
    assert script.main([str(word) for word in argv]) == 1
    line = error_of(capsys)
    assert json.loads(run_json.read_text())["exit_status"] == 1
    assert "a picture could not be drawn (RuntimeError: no font)" in line
    assert "the results are safe" in line and "--redraw" in line
    for name in kept:
        assert name in line
    return line.partition("draw it with: python ")[2]


def redraw(command: str) -> None:
    """The command of the line works as it is printed, by a shell."""
    done = subprocess.run(
        f"{sys.executable} {ROOT}/{command}", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_lost_picture_of_training(smoke_args, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "a $x 'run"
    with monkeypatch.context() as patch:
        patch.setattr(plt, "subplots", broken)
        argv = [*smoke_args, "--steps", "10", "--save_dir", folder]
        command = lost_picture(
            janus, argv, folder / "run.json", capsys, "janus_adaptive_final.pt", "telemetry.csv"
        )
    janus.load_checkpoint(folder / "janus_adaptive_final.pt", torch.device("cpu"), False)
    redraw(command)
    assert (folder / "training.png").stat().st_size > 10_000


def test_lost_pictures_of_the_later_phases(
    smoke_checkpoint, cache_dir, tmp_path, capsys, monkeypatch
):
    text = ["--cache_dir", cache_dir]
    acts = tmp_path / "acts"
    saes = tmp_path / "saes"
    csv = tmp_path / "results.csv"
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", broken)
        argv = [
            "--model_path",
            smoke_checkpoint,
            "--layers",
            3,
            "--tokens",
            8192,
            "--save_dir",
            acts,
        ]
        dumped = lost_picture(harvest, [*argv, *text], acts / "adaptive/run.json", capsys, "table1")
        argv = ["--activations_dir", acts, "--save_dir", saes, "--steps", 5, "--batch_size", 256]
        trained = lost_picture(
            sae, [*argv, *text], saes / "adaptive/run.json", capsys, "sae_metrics"
        )
        argv = ["--adaptive_model", smoke_checkpoint, "--layers", 3, 6, "--n_seqs", 8]
        argv += ["--bootstrap", 100, "--mode", "mean", "--save_file", csv]
        ablated = lost_picture(
            ablation, [*argv, *text], tmp_path / "run.json", capsys, "results.csv"
        )
        # Without its picture the CSV is finished: the next phase takes it
        argv = ["--ablation_csv", csv, "--save_dir", tmp_path / "h", "--n_seqs", 8]
        argv += ["--activations_dir", acts, "--saes_dir", saes]
        looked = lost_picture(
            hero, [*argv, *text], tmp_path / "h/run.json", capsys, "hero_report.md"
        )
    for command in (dumped, trained, ablated, looked):
        redraw(command)
    assert (acts / "adaptive" / "figure1_head_cosines.png").is_file()
    assert (saes / "figure2_l0_by_depth.png").is_file()
    assert (tmp_path / "results_figure4.png").is_file()
    assert (tmp_path / "h" / "hero_scores.png").is_file()


ENERGY = """--preset smoke --train_steps 4 --sequences 48 --sae_dict_size 128 --sae_iterations 3
    --permutations 60 --directions 60 --energy_layers 1 --intervened 4 --relaxed 2"""
REAL = """--corpus topics --corpus_tokens 4000 --sae_dict_size 128 --permutations 60
    --directions 60 --energy_layers 3"""


@pytest.mark.parametrize("script", [lens, real], ids=["minimal", "real"])
def test_a_lost_picture_of_energy(script, smoke_checkpoint, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "e"
    argv = [*ENERGY.split(), "--save_dir", folder, "--cache_dir", tmp_path / "cache"]
    if script is real:
        argv = ["--model_name", smoke_checkpoint, *REAL.split(), "--save_dir", folder]
    with monkeypatch.context() as patch:
        patch.setattr(plt, "subplots", broken)
        files = ["raw_results.json", "features.csv"]
        command = lost_picture(script, argv, folder / "run.json", capsys, *files)
    redraw(command)
    assert len(list(folder.glob("*.png"))) >= 2
    assert (folder / "research_report.md").is_file()


def test_a_lost_picture_of_seeds(tmp_path, capsys, monkeypatch):
    runs = []
    for seed in range(3):
        plant_seed(tmp_path / f"seed{seed}", seed)
        runs.append(tmp_path / f"seed{seed}")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(plt, "subplots", broken)
        assert seeds.main([*map(str, runs), "--save_dir", str(out)]) == 1
    line = error_of(capsys)
    assert "a picture could not be drawn (RuntimeError: no font)" in line
    assert "seeds_summary.csv" in line and (out / "seeds_summary.csv").is_file()
    redraw(line.partition("draw it with: python ")[2])
    assert (out / "seeds.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------- pictures
def impacts(n_layers: int, n_heads: int, largest: float) -> pd.DataFrame:
    """Rows of hero_importance.csv, two runs."""
    rng = np.random.default_rng(0)
    rows = []
    for run in ("adaptive", "control"):
        for layer in range(n_layers):
            for head in range(n_heads):
                delta = largest * rng.random()
                row = dict(
                    run=run, layer=layer, head=head, delta=delta, ci_lo=0.1, ci_hi=0.2, rank=1
                )
                rows.append(row | {"studied": False})
    return pd.DataFrame(rows)


def figures(monkeypatch) -> list[Figure]:
    """From now on: every figure that is closed, still whole."""
    kept = []
    monkeypatch.setattr(plt, "close", lambda figure="all": kept.append(figure))
    return kept


@pytest.mark.parametrize(("n_layers", "n_heads"), [(6, 6), (30, 9), (40, 40)])
def test_panels_side_by_side_have_the_same_ticks(n_layers, n_heads, tmp_path, monkeypatch):
    impacts(n_layers, n_heads, 0.01).to_csv(tmp_path / "hero_importance.csv", index=False)
    # The same words twice; one map is the other's twin
    query, key = np.tril_indices(33)
    maps = []
    for panel in ("hero: a", "match in b: b"):
        words = {"query_token": [f"w{i}" for i in query], "key_token": [f"w{i}" for i in key]}
        maps.append(pd.DataFrame(dict(panel=panel, query=query, key=key, attention=0.5, **words)))
    pd.concat(maps).to_csv(tmp_path / "hero_attention.csv", index=False)
    kept = figures(monkeypatch)
    hero.draw_importance(tmp_path)
    hero.draw_attention(tmp_path)
    for figure in kept:
        panels = [ax for ax in figure.axes if ax.get_title()]
        assert len(panels) == 2
        for side in ("x", "y"):
            shown = []
            for ax in panels:
                labels = getattr(ax, f"get_{side}ticklabels")()
                shown.append([(label.get_text(), label.get_rotation()) for label in labels])
            assert shown[0] == shown[1] and len(shown[0]) > 5


@pytest.mark.parametrize("largest", [0.3, 3.0, 90.0, 4000.0])
def test_axes_have_numbers_to_read(largest):
    rng = np.random.default_rng(1)
    rows = []
    for head in range(24):
        percent = -0.05 + largest * (head / 23) ** 3
        ends = dict(ci_all_lo_pct=percent, ci_all_hi_pct=percent)
        name = dict(run="a", mode="mean", layer=0, head=head, name=f"L0H{head}", rank=24 - head)
        rows.append(name | ends | {"pct_impact": percent + 1e-3 * rng.random(), "n_seq": 9})
    summary = dict(run="a", mode="mean", noise_limit=0.003, base_loss=5.0, n_unit=50)
    summary |= dict(unit="documents", unique_hero=True, hero_layer=0, hero_head=23)
    summary |= dict(ranked_by="mean")
    tables = pd.DataFrame(rows).assign(p_maxT=0.5), pd.DataFrame([summary])
    # The axis of the one, and the colour bar of the other, whose limits are written
    for figure, which, side in (
        (ablation.figure4(*tables), 0, "x"),
        (ablation.heatmap(*tables), -1, "y"),
    ):
        figure.canvas.draw()
        ax = figure.axes[which]
        low, high = getattr(ax, f"get_{side}lim")()
        ticks = [t for t in getattr(ax, f"get_{side}ticks")() if low <= t <= high]
        shown = [label.get_text() for label in getattr(ax, f"get_{side}ticklabels")()]
        plain = [text for text in shown if text and "$" not in text]
        assert 4 <= len(ticks) <= 20 and len(plain) == len(shown)
        numbers = [float(text.replace("\N{MINUS SIGN}", "-")) for text in plain]
        for tick in ticks:
            assert any(number == pytest.approx(tick, rel=6e-3, abs=1e-12) for number in numbers)
        plt.close(figure)


def depth_table(archs: list[str]) -> pd.DataFrame:
    rows = []
    for arch in archs:
        for layer in (0, 1):
            row = dict(run="a", unit="layer", arch=arch, setting="k 16", seed=0, site="z")
            row |= dict(layer=layer, n_documents=5, n_saes=1)
            numbers = dict(
                l0=16.0, l0_lo=15.0, l0_hi=17.0, l0_sd=math.nan, fvu=0.1, fvu_lo=0.05, fvu_hi=0.2
            )
            rows.append(row | numbers | {"split": "train"})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("archs", "panels"),
    [(["batchtopk"], 1), (["topk"], 1), (["relu"], 2), (["batchtopk", "relu"], 2), (["own"], 2)],
)
def test_figure_2_shows_l0_where_it_says_something(archs, panels):
    figure = sae.draw_depth(depth_table(archs))
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert len(labels) == panels and labels[-1].startswith("FVU")
    plt.close(figure)


def test_the_report_lists_every_part_that_was_run(tmp_path):
    """Beside each other: the ablation, whose record lies in the folder of the run, and both arms' harvests and SAEs."""
    sys.path.insert(0, str(ROOT / "tools"))
    report = pytest.importorskip("report")
    made = {
        "adaptive": "janus_adaptive.py",
        "control": "janus_adaptive.py",
        "activations/adaptive": "harvest_activations.py",
        "activations/control": "harvest_activations.py",
        "saes/adaptive": "train_sae.py",
        "saes/control": "train_sae.py",
        ".": "ablation_test.py",
        "energy_lens": "energy_lens_minimal.py",
        "hero_analysis": "hero_head_analysis.py",
    }
    for part, script in made.items():
        facts = dict(script=script, argv=[script], time="2026-01-01T00:00:00+0000", exit_status=0)
        facts |= dict(end="2026-01-01T00:01:00+0000", git=dict(commit="abc", dirty=False))
        janus.write_json(tmp_path / part / "run.json", facts)
    (tmp_path / "adaptive" / "telemetry.csv").touch()
    table = report.commands_table(report.Run(tmp_path))
    assert sorted(table["command"]) == sorted(made.values())
    assert set(table["part"]) == {"ablation", *made} - {"."}
    # What is missing is said as it is: a file, a column, a table that cannot be read
    assert report.what_is_missing(FileNotFoundError(2, "x", "a.csv")) == "a.csv is missing"
    assert "no column 'fvu'" in report.what_is_missing(KeyError("fvu"))
    assert "cannot be used" in report.what_is_missing(pd.errors.EmptyDataError("No columns"))


def test_the_hero_has_one_interval_in_text_and_picture(pair, cache_dir, tmp_path):
    assert study(pair, tmp_path / "h", cache_dir) == 0
    impact = pd.read_csv(tmp_path / "h" / "hero_impact.csv").iloc[0]
    drawn = pd.read_csv(tmp_path / "h" / "hero_preserving.csv")
    drawn = drawn[drawn["role"] == "hero"].iloc[0]
    found = drawn[["impact", "impact_low", "impact_high"]].astype(float).tolist()
    assert np.allclose(found, impact[["value", "ci_low", "ci_high"]].astype(float), equal_nan=True)
