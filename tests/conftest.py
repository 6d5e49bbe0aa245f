"""Shared fixtures: a small real text, and one smoke checkpoint trained on it, made once a session."""

import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for one another
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
    return ["--preset", "smoke", "--steps", "30", "--save_interval", "10", "--dtype", "float32", *data]


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
    assert janus_adaptive.main([*smoke_args, "--pressure", "control", "--save_dir", str(folder)]) == 0
    return folder / "janus_control_final.pt"
