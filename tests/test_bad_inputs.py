"""Wrong inputs, as users make them: exit 1 or 2, one clear line, no traceback, and nothing that existed is damaged."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ablation_test
import harvest_activations
import hero_head_analysis
import janus_adaptive as janus
import train_sae

SCRIPTS = {
    "train": janus,
    "harvest": harvest_activations,
    "sae": train_sae,
    "ablate": ablation_test,
    "hero": hero_head_analysis,
}


@pytest.fixture(scope="session")
def chain(smoke_checkpoint, cache_dir, tmp_path_factory) -> Path:
    """A finished pipeline of two layers in one folder: model/, activations/, saes/, results.csv, hero/."""
    root = tmp_path_factory.mktemp("chain")
    shutil.copytree(smoke_checkpoint.parent, root / "model")
    ckpt, quick = (
        str(root / "model" / "janus_adaptive_final.pt"),
        ["--dtype", "float32", "--cache_dir", str(cache_dir)],
    )
    dump = [
        "--model_path",
        ckpt,
        "--run_name",
        "adaptive",
        "--layers",
        "3",
        "6",
        "--tokens",
        "4096",
        "--save_dir",
        str(root / "activations"),
    ]
    assert harvest_activations.main([*dump, *quick]) == 0
    sae = [
        "--runs",
        "adaptive",
        "--layers",
        "3",
        "--activations_dir",
        str(root / "activations"),
        "--save_dir",
        str(root / "saes"),
    ]
    assert train_sae.main([*sae, "--steps", "20", *quick]) == 0
    csv = str(root / "results.csv")
    small = ["--n_seqs", "12", "--mode", "mean", "--layers", "3", "6", "--bootstrap", "200"]
    assert ablation_test.main(["--adaptive_model", ckpt, "--save_file", csv, *small, *quick]) == 0
    return root


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, run.json (which logs the failed attempt) and temporary files aside."""
    return {
        str(p.relative_to(folder)): janus.sha256(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "run.json"
    }


def refused(script: str, argv: list[str], capsys, says: str, folder: Path | None = None) -> None:
    """Runs a script with wrong input and checks everything that this file promises."""
    before = contents(folder) if folder else {}
    capsys.readouterr()
    try:
        code = SCRIPTS[script].main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    line = [x for x in err.splitlines() if "error:" in x]
    assert code in (1, 2), (code, err)
    assert len(line) == 1 and "Traceback" not in err, err
    assert code == 2 or err.strip() == line[0], err  # argparse adds its usage
    assert re.search(says, line[0]), line[0]
    assert len(line[0]) < 500
    if folder:
        after = contents(folder)
        assert {k: after.get(k) for k in before} == before


@pytest.fixture
def copy(chain, tmp_path) -> Path:
    """A copy of the chain to break."""
    shutil.copytree(chain, tmp_path / "c")
    return tmp_path / "c"


def text(tmp_path: Path, content: bytes, name: str = "t.txt") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


TRAIN = ["--preset", "smoke", "--steps", "5", "--tokenizer", "train:300", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "0 tokens"),
        ("blank.txt", b"\n \n\n", "0 tokens"),
        ("short.txt", b"three short words", "expected more than --seq_len 64"),
        ("latin1.txt", "caf\xe9 ".encode("latin1") * 500, "not UTF-8.*iconv"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read"),
        ("bad.parquet", b"PAR1 this is not a parquet file", "cannot be read"),
        ("wrong.jsonl", b'{"words": "a b c"}\n' * 50, "no column `text`"),
        ("corpus.pdf", b"%PDF", "expected a .txt"),
    ],
)
def test_texts(name, content, says, tmp_path, cache_dir, capsys):
    path = text(tmp_path, content, name)
    refused(
        "train",
        ["--dataset", path, *TRAIN, "--save_dir", tmp_path / "out", "--cache_dir", cache_dir],
        capsys,
        says,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--dataset", "nowhere.txt"], "no such file"),
        (["--d_model", "50"], "--d_model 50"),
        (["--n_heads", "1"], "at least 2"),
        (["--n_heads", "4", "--n_kv_heads", "3"], "multiple of --n_kv_heads 3"),
        (["--pressure", "strong"], "expected adaptive, control, constant:LAMBDA"),
        (["--pressure", "constant:much"], "expected adaptive, control, constant:LAMBDA"),
        (["--pressure", "replay:nowhere.csv"], "not a telemetry.csv"),
        (["--target_sigma", "-1"], "not a number above 0"),
        (["--target_sigma", "nan"], "not a number above 0"),
        (["--steps", "0"], "not a number above 0"),
        (["--steps", "many"], "invalid positive int value: 'many'"),
        (["--steps", "9" * 23], "9{23} does not fit into 64 bits"),
        (["--seed", str(2**63)], f"{2**63} does not fit into 64 bits"),
        (["--seed", "-" + "9" * 20], "does not fit into 64 bits"),
        (["--seed", "1.5"], "invalid integer value: '1.5'"),
        (["--filter_beta", "1"], r"--filter_beta 1.0 .* \[0, 1\)"),
        (["--k_p", "-0.1"], "must not be negative"),
        (["--tokenizer", "train:9"], "N above 256"),
        (["--tokenizer", "nowhere.json"], "expected a tokenizer.json"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--save", "x"], "unrecognized arguments: --save"),
        (["--device", "cuda"], "not available here; found: cpu"),
    ],
)
def test_training_flags(argv, says, text_file, cache_dir, tmp_path, capsys):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    base = [
        "--dataset",
        text_file,
        *TRAIN,
        "--save_dir",
        tmp_path / "out",
        "--cache_dir",
        cache_dir,
    ]
    refused("train", [*base, *argv], capsys, says)
    assert not list((tmp_path / "out").glob("*.pt"))


def broken_checkpoints(folder: Path) -> dict[str, tuple[Path, str]]:
    """Checkpoints that are not: {what: (path, what the line must say)}."""
    good = folder / "model" / "janus_adaptive_final.pt"

    def variant(name: str, data: bytes, keep_size: bool = True) -> Path:
        path = folder / f"{name}.pt"
        path.write_bytes(data)
        side = json.loads(janus.sidecar_path(good).read_text())
        janus.sidecar_path(path).write_text(
            json.dumps(side | ({"bytes": len(data)} if keep_size else {}))
        )
        return path

    whole = good.read_bytes()
    ckpt = torch.load(good, weights_only=True)
    nan = folder / "nan.pt"
    torch.save(ckpt | {"model": {k: v * float("nan") for k, v in ckpt["model"].items()}}, nan)
    other = folder / "other.pt"
    torch.save(ckpt | {"config": ckpt["config"] | {"n_layers": 3}}, other)
    alone = folder / "alone.pt"
    alone.write_bytes(whole)
    return {
        "missing": (folder / "nowhere.pt", "does not exist; make it with"),
        "a folder": (folder / "model", "is not a file"),
        "no sidecar": (alone, "no sidecar.*did not finish"),
        "truncated": (
            variant("truncated", whole[: len(whole) // 2], keep_size=False),
            "bytes, its sidecar says",
        ),
        "truncated, sidecar adapted": (
            variant("cut", whole[: len(whole) // 2]),
            "cannot be read as a janus.checkpoint",
        ),
        "a pickled object": (
            variant("pickled", pickle.dumps({"model": Path("x")})),
            "cannot be read as a janus.checkpoint",
        ),
        "a text": (variant("text", b"hello"), "cannot be read as a janus.checkpoint"),
        "another model": (
            variant("shape", other.read_bytes()),
            "cannot be read as a janus.checkpoint",
        ),
        "NaN weights": (variant("nans", nan.read_bytes()), "golden probe gives nan"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "missing",
        "a folder",
        "no sidecar",
        "truncated",
        "truncated, sidecar adapted",
        "a pickled object",
        "a text",
        "another model",
        "NaN weights",
    ],
)
@pytest.mark.parametrize("script", ["harvest", "ablate"])
def test_checkpoints(what, script, copy, cache_dir, capsys):
    path, says = broken_checkpoints(copy)[what]
    flag = {"harvest": "--model_path", "ablate": "--adaptive_model"}[script]
    where = {
        "harvest": ["--save_dir", copy / "activations", "--run_name", "x"],
        "ablate": ["--save_file", copy / "new.csv"],
    }[script]
    refused(script, [flag, path, *where, "--cache_dir", cache_dir], capsys, says, copy)
    assert not (copy / "new.csv").exists() and not list((copy / "activations").glob("x/*.npy"))


def test_pickles_are_never_executed(copy, cache_dir, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(copy / "exploded"),)

    path = copy / "bomb.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    side = json.loads(janus.sidecar_path(copy / "model" / "janus_adaptive_final.pt").read_text())
    janus.sidecar_path(path).write_text(json.dumps(side | {"bytes": path.stat().st_size}))
    refused(
        "harvest",
        ["--model_path", path, "--save_dir", copy / "a", "--cache_dir", cache_dir],
        capsys,
        "cannot be read",
    )
    assert not (copy / "exploded").exists()


@pytest.mark.parametrize("script", ["harvest", "ablate", "sae"])
def test_a_layer_out_of_range_names_the_valid_range(script, copy, cache_dir, capsys):
    ckpt = copy / "model" / "janus_adaptive_final.pt"
    argv = {
        "harvest": ["--model_path", ckpt, "--run_name", "x", "--save_dir", copy / "activations"],
        "ablate": ["--adaptive_model", ckpt, "--save_file", copy / "new.csv"],
        "sae": [
            "--runs",
            "adaptive",
            "--activations_dir",
            copy / "activations",
            "--save_dir",
            copy / "new",
        ],
    }[script]
    says = r"12.*(0 to 11|0\.\.11|0-11)" if script != "sae" else "12"
    refused(script, [*argv, "--layers", "3", "12", "--cache_dir", cache_dir], capsys, says, copy)


def test_dumps(copy, capsys):
    sae = [
        "--activations_dir",
        copy / "activations",
        "--save_dir",
        copy / "new",
        "--steps",
        "5",
        "--layers",
        "3",
    ]
    refused("sae", [*sae, "--runs", "nobody"], capsys, "nobody", copy)
    refused("sae", [*sae[:-1], "5", "--runs", "adaptive"], capsys, "harvest_activations.py", copy)
    dump = copy / "activations" / "adaptive" / "L3.z.npy"
    whole = dump.read_bytes()
    values = np.load(dump, mmap_mode="r+")
    values[100, 3] = np.nan
    values.flush()
    refused("sae", [*sae, "--runs", "adaptive"], capsys, "(?i)nan|not finite", copy)
    dump.write_bytes(whole[:-100])
    refused("sae", [*sae, "--runs", "adaptive"], capsys, "bytes, its sidecar says", copy)
    assert not list((copy / "new").rglob("sae_weights.safetensors.json"))


def test_a_dump_of_another_checkpoint(copy, control_checkpoint, cache_dir, capsys):
    argv = [
        "--activations_dir",
        copy / "activations",
        "--save_dir",
        copy / "new",
        "--steps",
        "5",
        "--runs",
        "adaptive",
        "--layers",
        "3",
    ]
    refused(
        "sae",
        [*argv, "--model_path", control_checkpoint, "--cache_dir", cache_dir],
        capsys,
        "(?i)checkpoint|model",
        copy,
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "."),
        (b"run,layer,head\n", "."),
        (b"a,b\n1,2\n", "."),
        (b"\xff\xfe\x00 no csv", "."),
        (None, "ablation_test.py"),
    ],
)
def test_ablation_csvs(content, says, copy, capsys):
    path = copy / "wrong.csv"
    if content is not None:
        path.write_bytes(content)
    refused("hero", ["--ablation_csv", path, "--save_dir", copy / "h"], capsys, says, copy)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--text", ""], "(?i)empty|text"),
        (["--text", "   "], "(?i)empty|text"),
        (["--run", "nobody"], "nobody"),
        (["--force_layer", "99", "--force_head", "0"], "99"),
        (["--force_layer", "3", "--force_head", "7"], "7"),
        (["--force_layer", "3"], "force_head"),
    ],
)
def test_hero_flags(argv, says, copy, cache_dir, capsys):
    base = [
        "--ablation_csv",
        copy / "results.csv",
        "--saes_dir",
        copy / "saes",
        "--activations_dir",
        copy / "activations",
    ]
    refused(
        "hero",
        [*base, "--save_dir", copy / "h", "--cache_dir", cache_dir, *argv],
        capsys,
        says,
        copy,
    )


def test_hero_of_a_checkpoint_that_moved(copy, cache_dir, capsys, chain):
    """The CSV names the checkpoint; if another file lies there now, the hash tells."""
    csv = copy / "results.csv"
    csv.write_text(csv.read_text().replace(str(chain / "model"), str(copy / "gone")))
    base = [
        "--saes_dir",
        copy / "saes",
        "--activations_dir",
        copy / "activations",
        "--save_dir",
        copy / "h",
        "--cache_dir",
        cache_dir,
    ]
    refused("hero", ["--ablation_csv", csv, *base], capsys, ".", copy)


def small_disk(tmp_path: Path, megabytes: float) -> Path:
    """A mounted tmpfs of that size; skips where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    r = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)],
        capture_output=True,
    )
    if r.returncode:
        pytest.skip("mounting a small disk needs root")
    return folder


@pytest.mark.parametrize("megabytes", [0.5, 14])
def test_a_full_disk(megabytes, smoke_args, tmp_path, capsys):
    """Too small from the start is refused before work; filled up on the way is one line, and what was there stays."""
    folder = small_disk(tmp_path, megabytes)
    try:
        (folder / "precious").write_text("mine")
        if megabytes > 1:
            janus.need_disk, kept = (
                (lambda *_: None),
                janus.need_disk,
            )  # let it start, and run out on the way
        refused(
            "train",
            [*smoke_args, "--save_interval", "5", "--save_dir", folder / "out"],
            capsys,
            "(?i)no space|GB",
        )
        assert (folder / "precious").read_text() == "mine"
        for pt in (folder / "out").glob("*.pt"):
            assert janus.sha256(pt) == json.loads(janus.sidecar_path(pt).read_text())["sha256"]
        assert not list((folder / "out").glob("*.tmp.*"))
    finally:
        if megabytes > 1:
            janus.need_disk = kept
        subprocess.run(["umount", str(folder)])


def test_a_folder_that_cannot_be_written(smoke_args, tmp_path):
    """As an ordinary user: root may write anywhere."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0:
        (folder / "out").write_text(
            "a file where a folder is wanted"
        )  # the same class of failure, which root meets too
        target = folder / "out" / "x"
    else:
        target = folder / "out"
    r = subprocess.run(
        [sys.executable, janus.__file__, *smoke_args, "--save_dir", str(target)],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 1 and "Traceback" not in r.stderr
    assert r.stderr.strip().count("\n") == 0 and str(folder) in r.stderr


# ---- what is not UTF-8, and terminals that lack letters
TOOLS = Path(janus.__file__).parent / "tools"
NOT_UTF8 = b"caf\xe9"  # Latin-1


@pytest.mark.parametrize(
    "argv",
    [
        ["janus_adaptive.py", "--save_dir", NOT_UTF8],
        ["harvest_activations.py", "--model_path", "x.pt", "--run_name", NOT_UTF8],
        ["train_sae.py", "--runs", NOT_UTF8],
        ["ablation_test.py", "--adaptive_model", NOT_UTF8],
        ["hero_head_analysis.py", "--text", NOT_UTF8],
        ["energy_lens_minimal.py", "--save_dir", NOT_UTF8],
        ["real_model_extension.py", "--model_name", NOT_UTF8],
        ["tools/import_hf.py", NOT_UTF8, "out"],
        ["tools/export_hf.py", NOT_UTF8, "out"],
        ["tools/feature_dashboard.py", NOT_UTF8],
        ["tools/report.py", NOT_UTF8],
    ],
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_an_argument_that_is_not_utf8_is_one_line(argv, locale, tmp_path):
    script = TOOLS.parent / argv[0]
    done = subprocess.run(
        [sys.executable, str(script), *argv[1:]],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": locale},
    )
    err = done.stderr.decode()
    assert done.returncode == 2, err
    # On a busy machine without its cache, matplotlib says that it looks for fonts
    lines = [line for line in err.splitlines() if "font cache" not in line]
    assert len(lines) == 1 and "not UTF-8" in err and r"caf\udce9" in err
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_not_utf8(copy, cache_dir, capsys):
    """As os.fsdecode hands it over when main() is called from Python."""
    argv = ["--ablation_csv", copy / "results.csv", "--saes_dir", copy / "saes"]
    argv += ["--activations_dir", copy / "activations", "--save_dir", copy / "hero"]
    argv += ["--cache_dir", cache_dir, "--text", os.fsdecode(NOT_UTF8)]
    refused("hero", argv, capsys, "not UTF-8")


@pytest.mark.parametrize("narrow", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_terminal_without_letters_stops_nothing(narrow, text_file, tmp_path):
    """Names and texts outside ASCII, from the first phase to its figure; files are UTF-8 always."""
    corpus = tmp_path / "Ünïcode · 日本.txt"
    shutil.copy(text_file, corpus)
    folder = tmp_path / "größe"
    done = subprocess.run(
        [
            sys.executable,
            janus.__file__,
            *["--preset", "smoke", "--steps", "2", "--tokenizer", "train:300"],
            *["--dataset", str(corpus), "--save_dir", str(folder)],
            *["--cache_dir", str(tmp_path / "cache"), "--dtype", "float32"],
        ],
        capture_output=True,
        env=os.environ | {"PYTHONCOERCECLOCALE": "0"} | narrow,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["exit_status"] == 0


@pytest.mark.parametrize(
    ("script", "name"), [("harvest", "--model_path"), ("ablate", "--adaptive_model")]
)
def test_a_tokenizer_with_ids_above_the_embedding(script, name, copy, cache_dir, capsys):
    more_ids(copy / "model" / "tokenizer.json")
    argv = [name, copy / "model" / "janus_adaptive_final.pt", "--cache_dir", cache_dir]
    place = copy / "new.csv" if script == "ablate" else copy / "new"
    argv += ["--save_file" if script == "ablate" else "--save_dir", place]
    refused(script, argv, capsys, "token ids go up to 512, its embedding has rows 0 to 511", copy)


def test_hero_of_a_tokenizer_with_ids_above_the_embedding(copy, cache_dir, capsys):
    model = copy / "model" / "janus_adaptive_final.pt"
    quick = ["--n_seqs", "12", "--mode", "mean", "--layers", "3", "--bootstrap", "200"]
    argv = ["--adaptive_model", model, "--save_file", copy / "own.csv", "--cache_dir", cache_dir]
    assert ablation_test.main([str(word) for word in [*argv, *quick]]) == 0
    more_ids(copy / "model" / "tokenizer.json")
    argv = ["--ablation_csv", copy / "own.csv", "--save_dir", copy / "hero"]
    argv += ["--cache_dir", cache_dir]
    refused("hero", argv, capsys, "token ids go up to 512, its embedding has rows 0 to 511")


def more_ids(path: Path) -> None:
    """Adds a token to a tokenizer.json, as add_tokens() without resizing the embedding does."""
    tokenizer = janus.Tokenizer.from_file(str(path))
    assert tokenizer.add_tokens(["<new>"]) == 1
    tokenizer.save(str(path))


def test_resume_with_other_tokens_is_refused(smoke_args, tmp_path, capsys):
    """A checkpoint whose text was read in another way must not go on with other tokens."""
    folder = tmp_path / "run"
    argv = [*smoke_args, "--save_dir", str(folder)]
    assert janus.main(argv) == 0
    for path in folder.glob("janus_*"):
        path.unlink()
    for checkpoint in folder.glob("ckpt_*.pt"):
        content = torch.load(checkpoint, weights_only=True)
        content["data"]["n_tokens"] -= 1
        torch.save(content, checkpoint)
        facts = json.loads(janus.sidecar_path(checkpoint).read_text())
        facts["bytes"] = checkpoint.stat().st_size
        janus.write_json(janus.sidecar_path(checkpoint), facts)
    says = r"--resume: n_tokens was \d+, is \d+: the tokens are others"
    refused("train", [*argv, "--resume"], capsys, says, folder)
