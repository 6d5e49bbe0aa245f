"""The page about SAE features, against SAELens and plain loops."""

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import harvest_activations
import train_sae

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import feature_dashboard as fd  # noqa: E402


@pytest.fixture(scope="module")
def made(smoke_checkpoint, cache_dir, tmp_path_factory) -> Path:
    """A dump of layer 2 and its SAE, and one of head 1."""
    root = tmp_path_factory.mktemp("dashboard")
    where = [
        "--save_dir",
        str(root / "activations"),
        "--cache_dir",
        str(cache_dir),
        "--dtype",
        "float32",
    ]
    assert (
        harvest_activations.main(
            ["--model_path", str(smoke_checkpoint), "--layers", "2", "--tokens", "6400", *where]
        )
        == 0
    )
    small = [
        "--activations_dir",
        str(root / "activations"),
        "--steps",
        "30",
        "--batch_size",
        "256",
        "--dtype",
        "float32",
    ]
    assert train_sae.main([*small, "--save_dir", str(root / "saes")]) == 0
    assert train_sae.main([*small, "--unit", "head", "--save_dir", str(root / "heads")]) == 0
    return root


@pytest.fixture(scope="module")
def src(made) -> fd.Source:
    return fd.open_source(made / "saes/adaptive/L2", None, None, 3200)


def test_activations_histogram_and_contexts_are_saelens(made, src):
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(made / "saes/adaptive/L2"))
    z = np.load(made / "activations/adaptive/L2.z.npy").astype(np.float32)
    z = torch.from_numpy(z.reshape(100, 64, -1)[::2].reshape(3200, -1))  # spread over the dump
    with torch.no_grad():
        theirs = sae.encode(z).view(50, 64, -1)
    chosen = fd.strongest(src, 5)
    assert len(set(chosen)) == 5
    assert torch.allclose(src.activations(chosen), theirs[..., chosen], atol=1e-5)
    for f, row in zip(chosen, fd.describe(src, chosen), strict=True):
        a = theirs[..., f]
        assert row.n_active == (a > 0).sum() == sum(row.counts) and row.largest == pytest.approx(
            a.max().item(), abs=1e-5
        )
        peaks = [next(v for _, v, peak in c if peak) for c in row.contexts]
        assert np.allclose(
            peaks, a.max(1).values.sort(descending=True).values[: len(peaks)], atol=1e-5
        )
        best = row.contexts[0]
        window = int(a.max(1).values.argmax())
        assert "".join(t for t, *_ in best) in "".join(src.say(src.idx[window].tolist()))


def test_sources_add_up_to_the_pre_activation(src):
    """Over heads and positions, to <w_enc, z> of the model's own z; and one position by the definition."""
    sae, tap = src.sae, {"z.2": None, "pattern.2": None, "resid_pre.2": None}
    with torch.no_grad():
        src.model(src.idx[3:4], tap=tap)
    for f in fd.strongest(src, 3):
        part = fd.sources(src, f, 3, 40)
        z = tap["z.2"][0, 40].flatten()
        assert part.shape == (3, 41) and part.sum().item() == pytest.approx(
            (z @ sae.weights["W_enc"][:, f]).item(), rel=1e-4, abs=1e-5
        )
        h, s = 1, 17
        block = src.model.blocks[2]
        v = (block.norm_attn(tap["resid_pre.2"][0, s]) @ block.attn.w_qkv.weight.T).view(3, 3, 16)[
            2, h
        ]
        assert part[h, s].item() == pytest.approx(
            (tap["pattern.2"][0, h, 40, s] * (v @ sae.weights["W_enc"][16:32, f])).item(),
            rel=1e-4,
            abs=1e-6,
        )


def test_logit_effects_and_head_shares_are_plain_products(src):
    model, w = src.model, src.sae.weights["W_dec"]
    f = fd.strongest(src, 1)[0]
    row = fd.describe(src, [f])[0]
    w_o = model.blocks[2].attn.w_o.weight
    with torch.no_grad():
        logits = (model.unembedding.weight * model.norm.weight) @ (w_o @ w[f])
        logits = logits - logits.mean()
        norms = torch.stack(
            [(w_o[:, 16 * h : 16 * h + 16] @ w[f, 16 * h : 16 * h + 16]).norm() for h in range(3)]
        )
    assert np.allclose(
        [v for _, v, _ in row.raises], logits.sort(descending=True).values[:10], atol=1e-5
    )
    assert np.allclose([v for _, v, _ in row.lowers], logits.sort().values[:10], atol=1e-5)
    assert np.allclose(row.heads, norms / norms.sum(), atol=1e-5)


def test_an_sae_of_one_head_writes_and_reads_there_alone(made):
    src = fd.open_source(made / "heads/adaptive/L2/H1", None, None, 3200)
    row = fd.describe(src, fd.strongest(src, 1))[0]
    assert (
        row.heads == pytest.approx([0, 1, 0])
        and row.origin.by_head[0] == row.origin.by_head[2] == 0
        and row.origin.by_head[1] != 0
    )


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_page_keeps_hostile_tokens_as_text_and_needs_no_network(src, monkeypatch):
    bad = ["<script>alert(1)</script>", "</details><img src=x onerror=alert(1)>", '"', "&lt;"]
    monkeypatch.setattr(src, "say", lambda ids: [bad[i % 4] for i in ids])
    page = fd.render("<b>", "", fd.describe(src, fd.strongest(src, 2)))
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img", "b"} & set(tags.tags) - {"b"} and tags.tags.count("b") == 4, (
        "raises and lowers, twice"
    )
    assert all(text in tags.text for text in bad) and not re.search(
        r"https?://|url\(|@import", page
    )


def test_wrong_inputs_are_one_line(made, tmp_path, capsys):
    out = tmp_path / "f.html"

    def says(*argv: str) -> str:
        assert fd.main([*argv, "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not out.exists()
        return error

    sae = str(made / "saes/adaptive/L2")
    assert "has features 0 to" in says(sae, "--features", "99999")
    assert "does not exist" in says(str(tmp_path / "nothing"))
    assert "does not exist" in says(sae, "--activations_dir", str(tmp_path))
    assert "expected at least 64 rows" in says(sae, "--tokens", "10")
    assert (
        fd.main([sae, "--features", "3", "--tokens", "640", "--out", str(out)]) == 0
        and "Feature 3:" in out.read_text()
    )


def test_tokens_look_as_in_their_text(src, monkeypatch):
    """Of letters that several tokens make, the contexts show each once, and places show it whole."""
    parts = ["·or", "", "", "日", "·but"]

    def say(ids: list[int]) -> list[str]:
        """Every window is these five tokens over and over."""
        return [parts[place % 5] for place in range(len(ids))]

    monkeypatch.setattr(src, "say", say)
    feature = fd.strongest(src, 1)
    row = fd.describe(src, feature)[0]
    for context in row.contexts:
        text = "".join(token.text for token in context)
        assert text in "·or日·but" * 20
    assert all(place.text in ("·or", "日", "·but") for place in row.origin.places)


def test_tokens_above_the_embedding_are_one_line(made, smoke_checkpoint, tmp_path):
    shutil.copytree(made / "activations", tmp_path / "activations")
    path = tmp_path / "activations" / "adaptive" / "tokens.npy"
    tokens = np.load(path)
    tokens[:] = 512
    np.save(path, tokens)
    with pytest.raises(fd.HandoffError, match="token ids go up to 512, its embedding has rows 0"):
        fd.open_source(made / "saes/adaptive/L2", tmp_path / "activations", None, 3200)
