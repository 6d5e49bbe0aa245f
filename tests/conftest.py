"""Shared fixtures: a small real text, and one smoke checkpoint trained on it, made once a session."""

import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are tiny: threads would only wait for one another
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language reference that comes with Python, half a megabyte of English, as one .txt."""
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n".join(topics[k] for k in sorted(topics)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache of this session's own; scripts find it through $JANUS_CACHE."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["JANUS_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def smoke_args(text_file: Path, cache_dir: Path) -> list[str]:
    """Command line of a training run of a few seconds: --preset smoke on the small text, float32."""
    data = ["--dataset", str(text_file), "--tokenizer", "train:512", "--cache_dir", str(cache_dir)]
    return [
        "--preset",
        "smoke",
        "--steps",
        "30",
        "--save_interval",
        "10",
        "--val_windows",
        "0",
        "--dtype",
        "float32",
        *data,
    ]


@pytest.fixture(scope="session")
def smoke_checkpoint(smoke_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """janus_adaptive_final.pt of the run of `smoke_args`: 12 layers x 48, 3 heads."""
    import janus_adaptive

    folder = tmp_path_factory.mktemp("smoke")
    assert janus_adaptive.main([*smoke_args, "--save_dir", str(folder)]) == 0
    return folder / "janus_adaptive_final.pt"


@pytest.fixture(scope="session")
def control_checkpoint(smoke_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """janus_control_final.pt: the same run without pressure."""
    import janus_adaptive

    folder = tmp_path_factory.mktemp("control")
    assert (
        janus_adaptive.main([*smoke_args, "--pressure", "control", "--save_dir", str(folder)]) == 0
    )
    return folder / "janus_control_final.pt"


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of four blocks and a tokenizer of 600 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        list(topics.values())[:20],
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=600,
        n_positions=128,
        n_embd=32,
        n_layer=4,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
