"""Phases 2 to 5 and the energy lens on models of other families: small random models, one a group of
options, against full forward passes with hooks, plain loops and formulas in float64."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_hero import WORDS, as_text, numbers, run, write_checkpoint, write_csv, write_text

import ablation_test
import harvest_activations
import hero_head_analysis as hero
import janus_adaptive as janus
import real_model_extension
import train_sae

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import feature_dashboard  # noqa: E402
import seeds  # noqa: E402

L, H, D, K, T, V = 3, 4, 24, 6, 16, 40
EXACT = torch.autocast("cpu", enabled=False)
NOT_ROTATED = (0.0, 0.0, 0.0)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(n_kv_heads=2),
    "gpt2": dict(
        biases=("qkv", "o", "up", "down", "norm"),
        centred=True,
        learned_positions=True,
        rope_frequency=(NOT_ROTATED, NOT_ROTATED),
        activation="gelu_tanh",
        gated=False,
    ),
    "phi": dict(  # NeoX's, and a bias of the unembedding
        biases=("qkv", "o", "up", "down", "norm", "unembedding"),
        centred=True,
        rope_frequency=((1.0, 0.2, 0.0), (1.0, 0.2, 0.0)),
        activation="gelu",
        gated=False,
        parallel=True,
        tied=False,
    ),
    "gemma2": dict(
        n_kv_heads=2,
        windows=(5, 0, 5),
        score_cap=2.0,
        logit_cap=6.0,
        embedding_scale=D**0.5,
        activation="gelu_tanh",
        norm_after=True,
    ),
    "gemma3": dict(  # a rotary table for each kind of layer
        n_kv_heads=1,
        windows=(5, 0, 5),
        rope_frequency=((0.5, 0.1, 0.02), (1.0, 0.3, 0.1)),
        qk_norm="head",
        norm_after=True,
    ),
    "qwen3": dict(n_kv_heads=2, biases=("qkv",), qk_norm="head", tied=False),
    "olmo2": dict(n_kv_heads=2, qk_norm="all", norm_before=False, norm_after=True, tied=False),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_option = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
INPUT_SITES = ["z", "attn_out", "mlp_out", "resid_pre", "resid_post"]


def build(script: ModuleType, family: str, **changes: Any) -> Any:
    """A random model of a family, of the NewGPT of a script; the same weights in every script.
    Gains are not 1, biases not 0, and everything is so large that all of it matters."""
    shape = dict(vocab_size=V, n_layers=L, d_model=D, n_heads=H, n_kv_heads=H, d_head=K)
    sizes = shape | dict(d_ff=32, seq_len=T) | FAMILIES[family] | changes
    model = script.NewGPT(script.GPTConfig(**sizes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        random = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.3 * random)
        else:
            is_embedding = "embedding" in name or "positions" in name
            weight.copy_((1.0 if is_embedding and weight.dim() > 1 else 0.3) * random)
    if model.cfg.centred:
        for block in model.blocks:
            for linear in (block.attn.w_o, block.w_down):
                for weight in linear.parameters():
                    weight -= weight.mean(0)
    return model


def windows(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(seed))


def at(model: Any, layer: int, head: int) -> hero.Head:
    return hero.Head("hero", "adaptive", layer, head, model)


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view(targets.shape)


Edit = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def edited(model: Any, site: str, layer: int, edit: Edit) -> Iterator[None]:
    """Within it, `edit` replaces an activation wherever the modules of the model hand it on; z
    [B, T, H K] is what the output projection reads."""
    block = model.blocks[layer]

    def of_input(_module: Any, inputs: Any) -> Any:
        return (edit(inputs[0]), *inputs[1:])

    def of_output(_module: Any, _inputs: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = {
        "z": lambda: block.attn.w_o.register_forward_pre_hook(of_input),
        "written": lambda: block.attn.w_o.register_forward_hook(of_output),
        "attn_out": lambda: block.norm_attn_out.register_forward_hook(of_output),
        "mlp_out": lambda: block.norm_mlp_out.register_forward_hook(of_output),
        "resid_pre": lambda: block.register_forward_pre_hook(of_input),
        "resid_post": lambda: block.register_forward_hook(of_output),
    }[site]()
    try:
        yield
    finally:
        handle.remove()


def caught(model: Any, idx: torch.Tensor, site: str, layer: int) -> torch.Tensor:
    """An activation of a full forward pass, as a hook sees it."""
    found = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        found.append(value.clone())
        return value

    with edited(model, site, layer, keep):
        model(idx)
    assert len(found) == 1
    return found[0]


def raw_logits(model: Any, idx: torch.Tensor) -> torch.Tensor:
    """Logits before a cap, as a hook on the unembedding sees them."""
    found = []
    handle = model.unembedding.register_forward_hook(lambda _m, _i, out: found.append(out))
    model(idx)
    handle.remove()
    return found[0]


def caught_qkv(model: Any, idx: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, H, T, K] of a full forward pass."""
    attn = model.blocks[layer].attn
    found = []

    def keep(*inputs: torch.Tensor) -> Any:
        found.append(type(attn).qkv(attn, *inputs))
        return found[0]

    attn.qkv = keep
    try:
        model(idx)
    finally:
        del attn.qkv
    return found[0]


def with_heads(new: torch.Tensor, heads: list[int]) -> Edit:
    """Puts `new` [..., K] in the place of z of some heads of a layer."""

    def edit(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        for head in heads:
            z[..., K * head : K * (head + 1)] = new
        return z

    return edit


# ------------------------------------------------------------------- phase 5: attribution and loss
@every_family
def test_the_parts_of_a_logit_sum_to_it(family: str) -> None:
    model = build(hero, family)
    text = as_text(windows(3))
    found = hero.attribute_next_token(at(model, 1, 2), text)
    raw = raw_logits(model, text.idx[:, :-1])  # [n, T-1, V]
    right = text.idx[:, 1:, None]
    wanted = (raw - raw.mean(-1, keepdim=True)).gather(-1, right)[..., 0]
    torch.testing.assert_close(found.parts.sum(-1), wanted, atol=1e-4, rtol=1e-5)
    assert found.gap < 1e-4
    assert len(found.components) == len(set(found.components)) == found.parts.shape[-1]
    n_more = {"gpt2": 1 + L + 1, "phi": L + 2}.get(family, 0)  # positions and biases
    assert len(found.components) == 1 + L * (H + 1) + n_more


@every_option
def test_a_part_is_what_its_name_says(family: str) -> None:
    """By formulas in float64, from what hooks see; each norm's rms held constant."""
    model = build(hero, family)
    cfg = model.cfg
    text = as_text(windows(2))
    found = hero.attribute_next_token(at(model, 1, 2), text)
    idx = text.idx[:, :-1]
    end = caught(model, idx, "resid_post", L - 1).double()  # [n, T-1, D]
    rms = (end.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
    w_u = model.unembedding.weight.double()
    w_u = (w_u - w_u.mean(0))[text.idx[:, 1:]]  # [n, T-1, D]
    gain = model.norm.weight.double()

    z = caught(model, idx, "z", 1).double()
    attn = model.blocks[1].attn
    written = z[..., 2 * K : 3 * K] @ attn.w_o.weight.double()[:, 2 * K : 3 * K].T
    own = {"L1 H2": written}
    if "o" in cfg.biases:
        own["L1 attention bias"] = attn.w_o.bias.double()
    if cfg.norm_after:
        together = caught(model, idx, "written", 1).double()
        size = (together.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
        own["L1 H2"] = written / size * model.blocks[1].norm_attn_out.weight.double()
    own["L1 MLP"] = caught(model, idx, "mlp_out", 1).double()
    if cfg.learned_positions:
        added = model.positions.weight[: T - 1].double()
        own["positions"] = added - added.mean(-1, keepdim=True)
        embedded = model.embedding.weight[idx].double()
        own["embedding"] = embedded - embedded.mean(-1, keepdim=True)
    parts = {name: (added / rms * gain * w_u).sum(-1) for name, added in own.items()}
    if "norm" in cfg.biases:
        parts["final norm's bias"] = (model.norm.bias.double() * w_u).sum(-1)
    if "unembedding" in cfg.biases:
        bias = model.unembedding.bias.double()
        parts["unembedding's bias"] = (bias - bias.mean())[text.idx[:, 1:]]
    for name, part in parts.items():
        ours = found.parts[..., found.components.index(name)].double()
        torch.testing.assert_close(ours, part, atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(
        found.of_head(at(model, 1, 2)).double(), parts["L1 H2"], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_an_edited_model_is_told_by_its_attribution(family: str, monkeypatch) -> None:
    """Also where a cap would hide the edit."""
    model = build(hero, family)
    unembed = hero.NewGPT.unembed
    bump = 0.01 * F.one_hot(windows(1)[0, 3], V)
    monkeypatch.setattr(hero.NewGPT, "unembed", lambda self, x: unembed(self, x) + bump)
    with pytest.raises(hero.HandoffError, match="misses the logits"):
        hero.attribute_next_token(at(model, 1, 2), as_text(windows(2)))


@every_option
def test_the_loss_with_another_z_is_that_of_a_full_forward_pass(family: str) -> None:
    model = build(hero, family)
    text = as_text(windows(3))
    new = torch.randn(3, T, K, generator=torch.Generator().manual_seed(2))
    clean = token_loss(model(text.idx)[0][:, :-1], text.idx[:, 1:])
    for layer in range(L):
        head = at(model, layer, 1)
        seen = head.look(text)
        torch.testing.assert_close(head.loss(seen, seen.head_z), clean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.attention @ seen.value, seen.head_z, atol=1e-5, rtol=1e-5)
        with edited(model, "z", layer, with_heads(new, [1])):
            expected = token_loss(model(text.idx)[0][:, :-1], text.idx[:, 1:])
        torch.testing.assert_close(head.loss(seen, new), expected, atol=1e-5, rtol=1e-5)
        assert (expected - clean).abs().max() > 1e-2


@every_option
def test_writes_are_as_long_as_what_reaches_the_residual_stream(family: str) -> None:
    model = build(hero, family)
    idx = windows(4)
    found = hero.write_norms(model, as_text(idx))
    for layer, head in ((0, 1), (2, 3)):
        z = caught(model, idx, "z", layer)[..., K * head : K * (head + 1)]
        block = model.blocks[layer]
        written = z @ block.attn.w_o.weight[:, K * head : K * (head + 1)].T
        if model.cfg.norm_after:
            together = caught(model, idx, "written", layer)
            size = (together.square().mean(-1, keepdim=True) + model.cfg.norm_eps).sqrt()
            written = written / size * block.norm_attn_out.weight
        written = written.flatten(0, 1)
        norm = (written - written.mean(0)).norm(dim=-1).mean().item()
        assert found[layer, head].item() == pytest.approx(norm, rel=1e-4)


# --------------------------------------------------------------------------- phase 5: by the weights
@every_family
def test_query_key_scores_are_those_of_a_forward_pass(family: str) -> None:
    """In layer 0 of bare tokens, where they stand; in layer 1 of what it reads in the text."""
    model = build(hero, family)
    cfg = model.cfg
    idx = windows(1)
    for layer, h in ((0, 3), (1, 2)):
        head = at(model, layer, h)
        q, k, _ = caught_qkv(model, idx, layer)
        expected = q[0, h] @ k[0, h].T / math.sqrt(K)  # [T, T]
        x = caught(model, idx, "resid_pre", layer)[0]  # [T, D]
        if cfg.norm_before:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + cfg.norm_eps)
        if layer == 0:
            bare = torch.cat([head.token_inputs(idx[0, t : t + 1], t) for t in range(T)])
            torch.testing.assert_close(bare, x, atol=1e-5, rtol=1e-5)
        for offset in (0, 1, 7):
            bands = hero.qk_by_band(head, x[offset:], x[: T - offset], offset)
            found = bands.sum(-1).diagonal()
            wanted = expected.diagonal(-offset)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@every_option
def test_decoded_pairs_are_the_largest_scores_of_pairs_in_a_text(family: str) -> None:
    """Each pair of tokens in a text of its own, the query in the middle of the context."""
    model = build(hero, family)
    cfg = model.cfg
    ids = torch.arange(5, 13)
    head = at(model, 0, 2)
    made = hero.decode_qk(head, ids, numbers)
    pairs, bands = (pd.DataFrame(rows) for rows in made)
    offsets = [1, 2] if cfg.windows else [1, 2, 8]  # those beyond window or context are left out
    assert list(pairs["offset"].unique()) == list(bands["offset"].unique()) == offsets
    for offset in offsets:
        idx = windows(1).repeat(len(ids) ** 2, 1)
        query = T // 2
        idx[:, query] = ids.repeat_interleave(len(ids))
        idx[:, query - offset] = ids.repeat(len(ids))
        q, k, _ = caught_qkv(model, idx, 0)
        score = (q[:, 2, query] * k[:, 2, query - offset]).sum(-1) / math.sqrt(K)
        score = score.view(len(ids), len(ids))
        before_cap = score - score.mean(1, keepdim=True)
        if cfg.score_cap:
            score = cfg.score_cap * torch.tanh(score / cfg.score_cap)
        score = score - score.mean(1, keepdim=True)
        of_offset = pairs[pairs["offset"] == offset]
        largest = score.flatten().sort(descending=True)
        np.testing.assert_allclose(of_offset["logits"], largest.values[:10], atol=1e-4)
        first = of_offset.iloc[0]
        place = largest.indices[0].item()
        assert int(first["query"]) == ids[place // len(ids)]
        assert int(first["key"]) == ids[place % len(ids)]
        shares = bands[bands["offset"] == offset]
        assert shares["share"].sum() == pytest.approx(1, abs=1e-4)
        assert before_cap.std() > 0.1
    frequencies = FAMILIES[family].get("rope_frequency")
    table = [10_000 ** (-2 * i / K) for i in range(K // 2)]
    if frequencies:
        table = list(frequencies[1 if cfg.windows else 0])
    wavelengths = dict.fromkeys(2 * math.pi / f if f else math.inf for f in table)
    np.testing.assert_allclose(shares["wavelength_tokens"], list(wavelengths))


def test_the_band_that_is_not_rotated_is_the_score_that_position_does_not_move() -> None:
    """Partial rotary: its share of the variance, from the part of q and k that does not turn."""
    model = build(hero, "phi")
    ids = torch.arange(12)
    _, bands = hero.decode_qk(at(model, 0, 1), ids, numbers)
    still = [row for row in bands if math.isinf(row["wavelength_tokens"]) and row["offset"] == 2]
    idx = windows(1).repeat(len(ids), 1)
    idx[:, 4] = ids
    idx[:, 6] = ids
    q, k, _ = caught_qkv(model, idx, 0)
    q, k = q[:, 1, 6], k[:, 1, 4]  # [n, K]
    whole = q @ k.T / math.sqrt(K)
    part = q[:, [2, 5]] @ k[:, [2, 5]].T / math.sqrt(K)  # frequency 2 turns the pair (2, 2 + K/2)
    whole = whole - whole.mean(1, keepdim=True)
    part = part - part.mean(1, keepdim=True)
    share = (part * whole).sum() / whole.square().sum()
    assert len(still) == 1 and still[0]["share"] == pytest.approx(share.item(), abs=1e-4)


@every_option
@pytest.mark.parametrize("layer", [0, 1])
def test_output_value_circuits_of_a_layer_add_up_to_what_attention_writes(
    family: str, layer: int
) -> None:
    """A token alone attends to itself fully."""
    model = build(hero, family)
    block = model.blocks[layer]
    ids = torch.arange(V)
    total = torch.zeros(V, D)
    for h in range(H):
        head = at(model, layer, h)
        weights = head.weights()
        value = head.token_inputs(ids, 0) @ weights.w_v.T + weights.b_v
        total += value @ weights.w_o.T
    if "o" in model.cfg.biases:
        total += block.attn.w_o.bias
    attn_out = caught(model, ids[:, None], "attn_out", layer)[:, 0]
    if model.cfg.norm_after:
        together = caught(model, ids[:, None], "written", layer)[:, 0]
        total /= (together.square().mean(-1, keepdim=True) + model.cfg.norm_eps).sqrt()
    torch.testing.assert_close(total, attn_out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_circuits_values_are_those_of_a_forward_pass_and_biases_do_not_copy(family: str) -> None:
    model = build(hero, family)
    idx = windows(V)
    idx[:, T // 2] = torch.arange(V)
    _, _, v = caught_qkv(model, idx, 0)
    head = at(model, 0, 1)
    circuit = hero.ov_circuit(head, rms=2.0)
    torch.testing.assert_close(circuit.values, v[:, 1, T // 2], atol=1e-4, rtol=1e-4)
    copying = hero.copying_score(head, circuit)["value"]
    circuit.values = circuit.values - head.weights().b_v
    assert hero.copying_score(head, circuit)["value"] == pytest.approx(copying, abs=1e-3)


# ----------------------------------------------------------------------- phase 5: local windows
def test_scores_count_only_keys_that_a_layer_sees() -> None:
    """Layers 0 and 2 see five tokens, layer 1 all: plain loops over the attention of a hook."""
    model = build(hero, "gemma2", vocab_size=6)
    idx = windows(5) % 6
    text = as_text(idx)
    found = hero.score_every_head(model, hero.score_texts(text, 6), under_null=False)
    tap: dict[str, Any] = {f"pattern.{layer}": None for layer in range(L)}
    model(idx, tap=tap)
    kinds = {
        "first position": lambda window, t, s: s == 0,
        "previous token": lambda window, t, s: s == t - 1,
        "0-5 tokens back": lambda window, t, s: s >= t - 5,
        "duplicate token": lambda window, t, s: s < t and window[s] == window[t],
        "induction": lambda window, t, s: 0 < s < t and window[s - 1] == window[t],
    }
    for layer in range(L):
        n_seen = model.cfg.windows[layer] or T
        for n, window in enumerate(idx.tolist()):
            attention = tap[f"pattern.{layer}"][n, 2].numpy()
            masses: dict[str, list[float]] = {name: [] for name in kinds}
            entropies = []
            for t in range(1, T):
                seen = range(max(0, t + 1 - n_seen), t + 1)
                assert attention[t, seen].sum() == pytest.approx(1, abs=1e-5)
                for name, kind in kinds.items():
                    keys = [s for s in seen if kind(window, t, s)]
                    if keys:
                        masses[name].append(attention[t, keys].sum())
                p = attention[t, seen]
                entropies.append(-(p * np.log(p)).sum() / np.log(len(seen)))
            for name, mass in masses.items():
                value = found[name][n, layer, 2].item()
                assert value == pytest.approx(np.mean(mass), abs=1e-5), (layer, name)
            value = found["entropy"][n, layer, 2].item()
            assert value == pytest.approx(np.mean(entropies), abs=1e-5)


def test_keys_at_random_are_drawn_from_those_that_are_seen() -> None:
    head = at(build(hero, "gemma2"), 0, 1)
    seen = head.look(as_text(windows(3)))
    reach = torch.ones(T, T).tril() - torch.ones(T, T).tril(-5)
    ones = torch.ones(3, T, T)
    counted = hero.Seen(seen.text, seen.x, seen.z, ones, torch.eye(T).expand(3, T, T), 1)
    for mechanism in hero.MECHANISMS:
        drawn = mechanism.control(counted)  # [n, T, T], which keys
        assert set(drawn.unique().tolist()) <= {0, 1} and (drawn * (1 - reach) == 0).all()
        claimed = mechanism.claimed(counted) * reach
        torch.testing.assert_close(drawn.sum(-1), claimed.sum(-1))


# ------------------------------------------------------------------------------------- the report
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", []),
        ("gpt2", ["a question without meaning", "middle of the context of 16"]),
        ("phi", []),
        ("gemma2", ["capped at ±6", "capped at ±2", "A norm follows", "0 (5), 2 (5)"]),
        ("olmo2", ["A norm follows"]),
    ],
)
def test_the_report_says_what_an_option_changes(family: str, said: list[str]) -> None:
    notes = hero.what_this_family_changes(at(build(hero, family), 1, 0))
    assert len(notes) == len(said)
    for words in said:
        assert sum(words in note for note in notes) == 1
    assert not any("\n" in note for note in notes)


def test_a_window_as_long_as_the_context_is_none() -> None:
    model = build(hero, "llama", windows=(T, 0, T + 1))
    assert hero.what_this_family_changes(at(model, 0, 0)) == []
    plain = build(hero, "llama")
    text = as_text(windows(2))
    texts = hero.score_texts(text, V)
    found = hero.score_every_head(model, texts, under_null=False)
    for name, value in hero.score_every_head(plain, texts, under_null=False).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_the_whole_analysis_of_another_family(tmp_path: Path) -> None:
    """Gemma 2's options, with GPT-2's positions and biases."""
    options = dict(learned_positions=True, rope_frequency=(NOT_ROTATED, NOT_ROTATED))
    options |= dict(biases=("qkv", "o", "norm"))
    model = build(hero, "gemma2", vocab_size=len(WORDS) + 1, **options)
    write_text(tmp_path / "text.txt", 150)
    path = write_checkpoint(tmp_path / "adaptive", model, "adaptive", tmp_path / "text.txt")
    write_csv(tmp_path / "results_ablation.csv", {"adaptive": path}, model, {"adaptive": (0, 1)})
    assert run(tmp_path) == 0
    report = (tmp_path / "out" / "hero_report.md").read_text()
    assert "which rotary frequency" in report and "question without meaning" in report
    assert "Logits are capped at ±6" in report and "0 (5), 2 (5)" in report
    parts = set(pd.read_csv(tmp_path / "out" / "hero_dla.csv")["component"])
    assert {"positions", "L2 attention bias", "final norm's bias"} <= parts
    bands = pd.read_csv(tmp_path / "out" / "hero_qk_bands.csv")
    assert np.isinf(bands["wavelength_tokens"]).all()
    np.testing.assert_allclose(bands["share"], 1, atol=1e-5)
    own = bands[bands["role"] == "hero"]
    assert set(own["offset"]) == {1, 2}  # its layer sees no farther
    # In [x, r, r] of 15 tokens it sees no key of induction: no score, and no rank
    scores = pd.read_csv(tmp_path / "out" / "hero_scores.csv")
    unseen = scores[(scores["role"] == "hero") & (scores["score"] == "induction, random tokens")]
    assert unseen[["value", "rank"]].isna().all(axis=None) and (unseen["n_heads"] == H).all()


# ------------------------------------------------------------------------- tools of phase 3 and 5
@every_option
def test_sources_of_a_feature_add_up_to_what_it_reads(family: str) -> None:
    model = build(hero, family)
    generator = torch.Generator().manual_seed(4)
    weights = {"W_enc": torch.randn(H * K, 3, generator=generator)}
    sae = hero.SAE("standard", None, None, weights, Path())
    nothing = dict(checkpoint_sha256="", z=np.zeros(0), dump=np.zeros(0), text="", say=numbers)
    idx = windows(2)
    for layer in range(L):
        source = feature_dashboard.Source(model, sae, "adaptive", layer, idx=idx, **nothing)
        z = caught(model, idx, "z", layer)
        for position in (0, 11):
            found = feature_dashboard.sources(source, 2, 1, position)
            assert found.shape == (H, position + 1)
            expected = (z[1, position] @ weights["W_enc"][:, 2]).item()
            assert found.sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@every_option
def test_random_heads_that_are_not_turned_are_the_heads(family: str, monkeypatch) -> None:
    model = build(janus, family)
    idx = windows(4)
    monkeypatch.setattr(seeds, "random_rotation", lambda size, _: torch.eye(size))
    found = seeds.random_writes(model, seeds.head_inputs(model, idx), 2, seed=0)
    torch.testing.assert_close(found, seeds.head_writes(model, idx, 2), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------- phases 2 to 4
@every_option
def test_each_ablation_of_a_layer_is_a_full_forward_pass_with_a_hook(family: str) -> None:
    model = build(ablation_test, family)
    tokens = windows(3)
    targets = windows(3, seed=5)
    substitute = torch.randn(H, K, generator=torch.Generator().manual_seed(3))
    clean = ablation_test.clean_pass(model, tokens, targets, list(range(L)))
    for layer in range(L):
        scores = ablation_test.ablate_layer(model, clean, layer, substitute)["loss"]
        base = token_loss(model(tokens)[0], targets)
        torch.testing.assert_close(scores[0], base, atol=1e-5, rtol=1e-5)
        for head in range(H):
            with edited(model, "z", layer, with_heads(substitute[head], [head])):
                expected = token_loss(model(tokens)[0], targets)
            torch.testing.assert_close(scores[1 + head], expected, atol=1e-5, rtol=1e-5)
            assert (expected - base).abs().max() > 1e-3
        # The slope of the loss along z, by a small step
        step = torch.zeros(H, K)
        step[1] = 1e-2 * torch.randn(K, generator=torch.Generator().manual_seed(6))
        losses = []
        for move in (step.flatten(), -step.flatten()):
            with edited(model, "z", layer, partial(torch.add, move)):
                losses.append(token_loss(model(tokens)[0], targets).mean(1).sum())
        slope = (clean.slope[layer] * step).sum()
        assert (losses[0] - losses[1]).item() / 2 == pytest.approx(slope.item(), rel=0.05, abs=2e-4)


@every_option
def test_the_loss_without_many_heads_is_a_full_forward_pass_with_hooks(family: str) -> None:
    model = build(ablation_test, family)
    tokens = windows(3)
    targets = windows(3, seed=5)
    generator = torch.Generator().manual_seed(3)
    means = {layer: torch.randn(H, K, generator=generator) for layer in range(L)}
    sets = torch.rand(4, L, H, generator=generator) < 0.4
    sets[0] = False
    removed = {layer: sets[:, layer] for layer in range(L)}
    found = ablation_test.joint_loss(model, tokens, targets, means, removed)  # [S, B]
    for row, heads in zip(found, sets, strict=True):
        with contextlib.ExitStack() as hooks:
            for layer, head in heads.nonzero().tolist():
                edit = with_heads(means[layer][head], [head])
                hooks.enter_context(edited(model, "z", layer, edit))
            expected = token_loss(model(tokens)[0], targets).mean(1)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@every_option
def test_a_spliced_activation_is_a_full_forward_pass_with_a_hook(family: str) -> None:
    model = build(train_sae, family)
    idx = windows(3)
    for layer in (0, 1):
        resid = model.run_blocks(model.embed(idx), 0, layer)
        for site in INPUT_SITES:
            found = train_sae.spliced(model, resid, layer, site, lambda x: 0.5 * x.flip(0) + 0.1)
            with edited(model, site, layer, lambda x: 0.5 * x.flip(0) + 0.1):
                expected = model(idx)[0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert (found - model(idx)[0]).abs().max() > 1e-2


@every_option
def test_harvested_sites_are_what_hooks_see(family: str) -> None:
    model = build(harvest_activations, family)
    idx = windows(2)
    assert set(harvest_activations.SITES) == set(INPUT_SITES)
    for site in INPUT_SITES:
        found = harvest_activations.layer_activations(model, idx, [0, 2], site, EXACT)
        for name, rows in found.items():
            which, layer = name.split(".")
            expected = caught(model, idx, which, int(layer)).flatten(0, 1)
            torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ the energy lens
@every_option
def test_the_energy_lens_unembeds_and_reruns_as_the_model_does(family: str) -> None:
    model = build(real_model_extension, family)
    modules = (model.blocks, model.norm, model.unembedding)
    lm = real_model_extension.LanguageModel(family, model, *modules, list, numbers, T)
    idx = windows(2)
    logits = model(idx)[0]
    last = caught(model, idx, "resid_post", L - 1)
    torch.testing.assert_close(lm.unembed(last), logits, atol=1e-5, rtol=1e-5)
    for layer in range(L):
        h = caught(model, idx, "resid_post", layer)
        again, kept = lm.run(idx, replace={layer: h}, keep=(L - 1,))
        torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept[L - 1], last, atol=1e-5, rtol=1e-5)
