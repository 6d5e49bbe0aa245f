"""The page about SAE features, against SAELens and plain loops, and in a browser."""

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import harvest_activations
import train_sae

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import feature_dashboard as fd  # noqa: E402

from hero_head_analysis import write_sidecar  # noqa: E402


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


def strongest(src: fd.Source, n: int) -> list[int]:
    """The n features that write most, however often they are active."""
    found = fd.survey(src)
    return fd.strongest(found, n, torch.ones_like(found.is_sparse()))


def test_activations_histogram_and_contexts_are_saelens(made, src):
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(made / "saes/adaptive/L2"))
    z = np.load(made / "activations/adaptive/L2.z.npy").astype(np.float32)
    z = torch.from_numpy(z.reshape(100, 64, -1)[::2].reshape(3200, -1))  # spread over the dump
    with torch.no_grad():
        theirs = sae.encode(z).view(50, 64, -1)
    chosen = strongest(src, 5)
    assert len(set(chosen)) == 5
    assert torch.allclose(src.activations(chosen), theirs[..., chosen], atol=1e-5)
    for f, row in zip(chosen, fd.describe(src, chosen), strict=True):
        a = theirs[..., f]
        assert row.n_active == (a > 0).sum() == sum(row.counts) and row.largest == pytest.approx(
            a.max().item(), abs=1e-5
        )
        top = row.groups[0].contexts
        peaks = [next(v for _, v, peak in c.tokens if peak) for c in top]
        assert peaks == [c.activation for c in top] and len(peaks) == fd.N_STRONGEST
        assert np.allclose(
            peaks, a.max(1).values.sort(descending=True).values[: len(peaks)], atol=1e-5
        )
        best = row.groups[0].contexts[0].tokens
        window = int(a.max(1).values.argmax())
        assert "".join(t for t, *_ in best) in "".join(src.say(src.idx[window].tolist()))


def test_sources_add_up_to_the_pre_activation(src):
    """Over heads and positions, to <w_enc, z> of the model's own z; and one position by the definition."""
    sae, tap = src.sae, {"z.2": None, "pattern.2": None, "resid_pre.2": None}
    with torch.no_grad():
        src.model(src.idx[3:4], tap=tap)
    for f in strongest(src, 3):
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
    f = strongest(src, 1)[0]
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
    row = fd.describe(src, strongest(src, 1))[0]
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
    page = fd.render("<b>", ["<b>"], fd.describe(src, strongest(src, 2)), {"<b>": "<b>"})
    tags = Tags()
    tags.feed(page)
    assert not {"img", "b"} & set(tags.tags) and tags.tags.count("script") == 1, "the page's own"
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
    feature = strongest(src, 1)
    row = fd.describe(src, feature)[0]
    for group in row.groups:
        for context in group.contexts:
            text = "".join(token.text for token in context.tokens)
            assert text in "·or日·but" * 20
            assert all(token.text for token in context.tokens), "letters are whole"
            assert sum(token.is_peak for token in context.tokens) == 1
    assert all(token.text for token in row.origin.tokens)
    assert all(place.text in ("·or", "日", "·but") for place in row.origin.places)


def test_tokens_above_the_embedding_are_one_line(made, smoke_checkpoint, tmp_path):
    shutil.copytree(made / "activations", tmp_path / "activations")
    path = tmp_path / "activations" / "adaptive" / "tokens.npy"
    tokens = np.load(path)
    tokens[:] = 512
    np.save(path, tokens)
    with pytest.raises(fd.HandoffError, match="token ids go up to 512, its embedding has rows 0"):
        fd.open_source(made / "saes/adaptive/L2", tmp_path / "activations", None, 3200)


# ------------------------------------------------------------------------- which, and where active
def test_five_groups_are_fifths_of_the_ranked_activations(src):
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(50, 64, generator=generator).relu()  # [N, T], half of it 0
    ranked = sorted((a for a in activation.flatten().tolist() if a > 0), reverse=True)
    groups = fd.group_contexts(src, activation)
    assert [group.name for group in groups] == fd.GROUPS
    start = 0
    for group in groups:
        assert group.n in (len(ranked) // 5, len(ranked) // 5 + 1)
        part = ranked[start : start + group.n]
        start += group.n
        assert (group.largest, group.smallest) == (part[0], part[-1])
        shown = [context.activation for context in group.contexts]
        assert set(shown) <= set(part) and shown == sorted(shown, reverse=True)
    assert start == len(ranked)
    of_window = activation.max(1).values.sort(descending=True).values
    first = [context.activation for context in groups[0].contexts]
    assert first == of_window[: fd.N_STRONGEST].tolist(), "the strongest, one a window"
    assert all(len(group.contexts) == fd.N_CONTEXTS for group in groups[1:])


def test_too_few_active_tokens_are_one_group_and_none_are_no_group(src):
    activation = torch.zeros(50, 64)
    assert fd.group_contexts(src, activation) == [] and fd.usual_tokens(src, activation) == []
    activation[3, 5] = 2.0
    activation[7, 9] = 1.0
    (group,) = fd.group_contexts(src, activation)
    assert (group.name, group.n, group.largest, group.smallest) == ("All", 2, 2.0, 1.0)
    assert [context.activation for context in group.contexts] == [2.0, 1.0]


def test_usual_tokens_are_counted_in_the_strongest_fifth_and_everywhere(src):
    token = int(src.idx[0, 0])
    is_it = src.idx == token  # [N, T]
    activation = is_it.float() * 5
    n_active = int(is_it.sum())
    quiet = (~is_it).flatten().nonzero()[: 4 * n_active, 0]
    activation.view(-1)[quiet] = 1.0
    first = fd.usual_tokens(src, activation)[0]
    assert first.text == src.say([token])[0] and first.share == 1
    assert first.everywhere == pytest.approx(n_active / src.idx.numel())


def made_up(frequency: list[float]) -> fd.Survey:
    """Features of which the later ones write more."""
    written = torch.arange(1.0, len(frequency) + 1)
    return fd.Survey(torch.tensor(frequency), written, 3.0)


def test_without_a_hero_analysis_the_sparse_features_are_shown_and_why():
    found = made_up([0.5, 0.01, 0.0005, 0.04, 0.002, 0.0])
    every = fd.choose(found, fd.NO_STUDY, 50)
    assert every.features == [4, 3, 1]
    assert "all 3 that are active on 0.1 to 5 % of tokens" in every.why
    two = fd.choose(found, fd.NO_STUDY, 2)
    assert two.features == [4, 3] and "Shown are 2 of the 3" in two.why
    dense = fd.choose(made_up([0.5, 0.3, 0.0]), fd.NO_STUDY, 50)
    assert sorted(dense.features) == [0, 1, 2]
    assert "No feature is active on 0.1 to 5 %" in dense.why


def test_how_often_counts_every_feature_once():
    said = fd.how_often(torch.tensor([0.5, 0.01, 0.0005, 0.04, 0.002, 0.0]), 1000)
    assert "Of the 6, 3 are active on 0.1 to 5 % of the 1,000 tokens" in said
    assert "1 on more (dense), 1 on fewer and 1 on none" in said


OFF = fd.Effect(0.007, 0.002, 0.016, 53, 16)
NULL = fd.Effect(0.001, -0.001, 0.002, 53, 16)
FALLS = fd.Effect(-0.004, -0.008, -0.001, 53, 16)
ONE_SIDED = fd.Effect(-0.004, -math.inf, 0.0077, 24, 16)
FEW = fd.Effect(0.007, math.nan, math.nan, 3, 16)


def test_the_heros_features_stand_by_effect_those_off_zero_first():
    effects = {1: NULL, 2: OFF, 3: fd.Effect(0.1, -1, 1, 53, 16), 4: FALLS, 5: OFF}
    study = fd.HeroStudy("L3H1", effects, [1, 2, 3, 4])  # 5 is a twin
    choice = fd.choose(made_up([0.5] * 6), study, 50)
    assert choice.features == [2, 4, 3, 1]
    assert "4 features of head L3H1" in choice.why
    assert fd.choose(made_up([0.5] * 6), study, 2).features == [2, 4]


@pytest.mark.parametrize(
    ("effect", "sentence"),
    [
        (OFF, "The loss rises: +7 [2, 16] millinats a token."),
        (FALLS, "The loss falls: -4 [-8, -1] millinats a token."),
        (NULL, "No effect that can be told from 0: +1 [-1, 2] millinats a token."),
        (ONE_SIDED, "Cannot tell: -4 [-∞, 7.7] millinats a token; 24 documents bound it on one"),
        (FEW, "Cannot tell: +7 millinats a token, and 3 documents are too few for an interval."),
    ],
)
def test_the_sentence_about_an_effect_is_that_of_its_interval(effect, sentence):
    assert fd.effect_in_words(effect).startswith(sentence)


def described(number: int, effect: fd.Effect | None = None, frequency: float = 0.01) -> fd.Feature:
    """A feature of made-up numbers, its texts hostile."""
    tokens = [fd.Token(text, 0.5 * place) for place, text in enumerate(HOSTILE)]
    tokens.append(fd.Token(" one", 2.0, is_peak=True))
    groups = []
    for name in fd.GROUPS:
        groups.append(fd.Group(name, 2.0, 1.0, 7, [fd.Context(2.0, tokens)]))
    return fd.Feature(
        number=number,
        n_active=35,
        frequency=frequency,
        largest=2.0,
        groups=groups,
        usual=[fd.UsualToken(HOSTILE[0], 0.5, 0.01)],
        counts=[3, 2],
        edges=[0.0, 1.0, 2.0],
        origin=fd.Origin(tokens, [fd.Place(HOSTILE[1], 3, -0.5)], [0.5, -1.0]),
        heads=[0.25, 0.75],
        raises=tokens,
        lowers=tokens,
        effect=effect,
    )


def test_the_first_screen_says_for_how_many_the_loss_changes():
    def says(*effects: fd.Effect | None) -> str:
        shown = [described(number, effect) for number, effect in enumerate(effects)]
        return fd.effects_in_words(shown, "L3H1")

    one = says(OFF, NULL, NULL)
    assert "rises for 1 of the 3 (feature 0: +7 [2, 16] millinats a token)" in one
    assert "For 2 no effect can be told from 0." in one and "falls" not in one
    assert says(NULL, NULL) == "For none of the 2 can an effect on the loss be told from 0."
    assert "falls for 1 of the 2" in says(FALLS, NULL)
    unknown = says(FEW, ONE_SIDED)
    assert unknown == "For 2 of the 2 one cannot tell: too few documents."
    assert "not measured" in says(None, None)


def test_dense_features_are_called_dense():
    dense = described(1, frequency=0.051)
    sparse = described(2, frequency=0.05)
    assert fd.how_dense([sparse, sparse]) == ""
    assert fd.how_dense([dense, sparse]).startswith("One of those shown is dense:")
    assert fd.how_dense([dense, dense]).startswith("All are dense:")
    mark = '<span class="dense">dense</span>'
    assert fd.render("t", [], [dense]).count(mark) == 2, "in the index and above the feature"
    assert mark not in fd.render("t", [], [sparse])


def test_a_feature_says_whether_other_seeds_have_it_where_that_is_known():
    one, other = described(1), described(2)
    page = fd.render("t", [], [one, other])
    assert "other seeds" not in page
    one.stability, other.stability = 0.8125, math.nan
    page = fd.render("t", [], [one, other])
    heading = re.search(r"<th[^>]*>\s*<button[^>]*>Same in other seeds<", page)
    assert "matched one to one" in heading[0], "explained when pointed at"
    cells = re.findall(r'<td class="number wide" data-value="([\d.na]+)">(.+?)</td>', page)
    assert cells[1::2] == [("0.8125", "0.812"), ("nan", "–")]
    assert len(re.findall(r"<dd>\s*(?:0.812|–)\s*<small>\s*cosine", page)) == 2


def test_stability_is_read_from_beside_the_sae(made, src, tmp_path):
    feature = strongest(src, 1)[0]
    assert fd.describe(src, [feature])[0].stability is None
    shutil.copytree(src.sae.folder, tmp_path / "sae")
    table = pd.DataFrame({"latent": [feature], "stability": [0.75]})
    table.to_csv(tmp_path / "sae" / "latent_stability.csv", index=False)
    here = fd.open_source(tmp_path / "sae", made / "activations", None, 3200)
    other = (feature + 1) % here.sae.n_features
    known, unknown = fd.describe(here, [feature, other])
    assert known.stability == 0.75 and math.isnan(unknown.stability)


# --------------------------------------------------------------------------- what phase 5 measured
@pytest.fixture
def study_folder(src, tmp_path) -> Path:
    """hero_features.csv and hero_contexts.csv as phase 5 would write them of this SAE."""
    features = strongest(src, 2)
    activation = src.activations(features)  # [N, T, 2]
    facts = {"checkpoint_sha256": src.checkpoint_sha256}
    place = {"role": "hero", "run": src.run_name, "layer": 2, "head": 1}
    rows = []
    contexts = []
    for column, kind in enumerate(["hero", "matched-random"]):
        effect = {"value": 0.007, "ci_low": 0.002, "ci_high": 0.016, "n": 53, "tests": 16}
        rows.append({**place, "feature": features[column], "kind": kind, **effect})
        window, position = divmod(int(activation[..., column].argmax()), 64)
        value = float(activation[window, position, column])
        row = {"feature": features[column], "kind": kind, "activation": value}
        contexts.append({**row, "window": 2 * window, "position": position})  # spread: every second
    folder = tmp_path / "hero_analysis"
    folder.mkdir()
    for name, table in {"features": rows, "contexts": contexts}.items():
        path = folder / f"hero_{name}.csv"
        pd.DataFrame(table).to_csv(path, index=False)
        write_sidecar(path, "janus.hero/2", [], **facts)
    return folder


def test_a_hero_analysis_is_known_by_the_activations_that_it_names(src, study_folder, capsys):
    study = fd.find_hero(src, study_folder)
    features = strongest(src, 2)
    assert (study.head, study.own) == ("L2H1", features[:1])
    assert study.effects[features[1]] == fd.Effect(0.007, 0.002, 0.016, 53, 16)
    row = fd.describe(src, features[:1], study)[0]
    assert fd.effect_in_words(row.effect).startswith("The loss rises: +7 [2, 16]")

    contexts = study_folder / "hero_contexts.csv"
    table = pd.read_csv(contexts)
    table["activation"] *= 1.1
    table.to_csv(contexts, index=False)
    write_sidecar(contexts, "janus.hero/2", [], checkpoint_sha256=src.checkpoint_sha256)
    with pytest.raises(fd.HandoffError, match="of another layer, model, SAE or dump"):
        fd.find_hero(src, study_folder)


def test_an_older_table_is_one_clear_line(src, study_folder):
    path = study_folder / "hero_features.csv"
    pd.read_csv(path).drop(columns="ci_low").to_csv(path, index=False)
    write_sidecar(path, "janus.hero/2", [], checkpoint_sha256=src.checkpoint_sha256)
    with pytest.raises(fd.HandoffError, match="ci_low.*remake it with: python hero_head"):
        fd.find_hero(src, study_folder)


def test_from_another_folder_everything_is_found_beside_the_sae(
    made, src, smoke_checkpoint, study_folder, tmp_path, monkeypatch, capsys
):
    """The sidecar names what it was made of as from a folder that is not this one."""
    runs = tmp_path / "moved" / "runs"
    shutil.copytree(made, runs)
    shutil.copytree(study_folder, runs / "hero_analysis")
    shutil.copytree(smoke_checkpoint.parent, runs / "model")
    sidecar = runs / "saes/adaptive/L2/sae_weights.safetensors.json"
    side = json.loads(sidecar.read_text())
    side["inputs"][0]["path"] = "runs/activations/adaptive/L2.z.npy"
    side["checkpoint"] = "runs/model/janus_adaptive_final.pt"
    sidecar.write_text(json.dumps(side))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert fd.main(["../moved/runs/saes/adaptive/L2", "--tokens", "3200"]) == 0
    assert capsys.readouterr().err == ""
    page = (elsewhere / "features.html").read_text()
    assert "Shown is the one feature of head L2H1" in page
    assert f"Feature {strongest(src, 1)[0]}:" in page


def test_a_folder_of_several_saes_stands_for_the_nearest_to_the_defaults(
    made, study_folder, tmp_path, capsys
):
    """Of the smoke preset: k 8, seed 42. The hero analysis is found beside them all."""
    layer = tmp_path / "saes" / "adaptive" / "L2"
    of_layer = made / "saes" / "adaptive" / "L2"
    for place, changed in {
        "k32/seed42": {"k": 32},
        "k8/seed1": {"seed": 1},
        "k8/seed42": {},
        "k8/seed42/null_decoder": {"null": "decoder"},
    }.items():
        shutil.copytree(of_layer, layer / place)
        sidecar = layer / place / "sae_weights.safetensors.json"
        side = json.loads(sidecar.read_text())
        assert (side["preset"], side["k"], side["seed"]) == ("smoke", 8, 42)
        sidecar.write_text(json.dumps(side | changed))
    page = tmp_path / "features.html"
    flags = ["--tokens", "3200", "--out", str(page)]
    assert fd.main([str(layer), *flags]) == 0
    text = " ".join(page.read_text().split())
    assert f"{layer}/k8/seed42 (batchtopk, k 8, seed 42), " in text
    assert f"of those in {layer} the one nearest to the defaults" in text
    assert "Shown is the one feature of head L2H1" in text
    assert fd.main([str(layer / "k32" / "seed42"), *flags]) == 0
    assert f"{layer}/k32/seed42 (batchtopk, k 32, seed 42), " in page.read_text()
    capsys.readouterr()
    assert fd.main([str(layer / "k8" / "seed42" / "null_decoder"), *flags]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "is a null (decoder)" in line
    assert fd.main([str(tmp_path / "empty"), *flags]) == 1
    assert "does not exist; make it with: python train_sae.py" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ in a browser
HOSTILE = [
    "<script>window.hacked=1</script>",
    "</span></details><img src=x onerror=window.hacked=1>",
    '" onmouseover="window.hacked=1',
    "&lt;i&gt;",
    "-" * 300,
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=quiet)
        yield b
        b.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Three features in the order 30, 10, 20, the second without a measured effect."""
    features = [described(30, OFF, 0.02), described(10, None, 0.2), described(20, NULL, 0.01)]
    path = tmp_path_factory.mktemp("page") / "features.html"
    about = [HOSTILE[0], "Shown are 3."]
    path.write_text(fd.render(HOSTILE[1], about, features, {"x": HOSTILE[2]}), encoding="utf-8")
    return path


def visible(page) -> list[str]:
    return page.evaluate(
        "[...document.querySelectorAll('.feature')].filter(f => f.checkVisibility()).map(f => f.id)"
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_stays_text_fits_and_asks_for_nothing(width, scheme, browser, hostile):
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    said = []
    asked = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(hostile.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for address in ("#f30", "#f10", "#f20"):
        page.evaluate(f"location.hash = '{address}'")
        page.wait_for_function(f"!document.querySelector('{address}').hidden")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert visible(page) == [address[1:]]
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    text = page.locator("body").text_content()
    assert all(hostile_text in text for hostile_text in HOSTILE)
    spans = page.locator("#f20 .context span")
    assert spans.nth(5).text_content() == " one", "a blank is a blank"
    assert spans.nth(5).evaluate("e => getComputedStyle(e).borderLeftStyle") == "solid"
    ground = "getComputedStyle(document.body).backgroundColor"
    was = page.evaluate(ground)
    page.locator("#theme").press("Enter")
    assert page.evaluate(ground) != was and (was == "rgb(255, 255, 255)") == (scheme == "light")
    assert not said and [url for url in asked if not url.startswith("data:")] == [hostile.as_uri()]
    page.close()


def test_previous_next_sort_and_values_by_keyboard(browser, hostile):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.goto(hostile.as_uri())
    assert visible(page) == ["f30"], "the first one"
    assert page.locator("#f30 .previous").is_hidden()

    # Next, twice without moving the focus; at the end the focus is on the way back
    page.locator("#f30 .next").focus()
    page.keyboard.press("Enter")
    assert visible(page) == ["f10"] and page.evaluate("location.hash") == "#f10"
    page.keyboard.press("Enter")
    assert visible(page) == ["f20"] and page.locator("#f20 .next").is_hidden()
    page.locator("#f20 .previous").focus()
    page.keyboard.press("Enter")
    assert visible(page) == ["f10"]
    page.go_back()
    page.wait_for_function("!document.querySelector('#f20').hidden")

    def order() -> list[str]:
        return page.locator(".index tbody a").all_text_contents()

    def sort_by(name: str) -> str:
        heading = page.locator(".index th", has_text=name)
        heading.locator("button").press("Enter")
        return heading.get_attribute("aria-sort")

    assert order() == ["30", "10", "20"]
    assert sort_by("Feature") == "ascending" and order() == ["10", "20", "30"]
    assert sort_by("Feature") == "descending" and order() == ["30", "20", "10"]
    assert sort_by("Active on") == "descending" and order() == ["10", "30", "20"]
    assert sort_by("Loss without it") == "descending" and order() == ["30", "20", "10"]
    assert page.locator(".index th[aria-sort=descending]").count() == 1
    # Neighbours are those of the index as it is sorted
    page.locator("#f20 .next").press("Enter")
    assert visible(page) == ["f10"]

    # A line that has the focus tells its values; a token that is pointed at its own
    page.locator("#f10 .line .context").first.focus()
    told = page.locator("#f10 .tell")
    assert "“ one” 2" in told.inner_text() and "“&lt;i&gt;” 1.5" in told.inner_text()
    page.locator("#f10 .line .context .peak").first.hover()
    assert told.inner_text().strip() == "“ one” 2"
    page.locator("#f10 details summary").press("Enter")
    assert page.locator("#f10 details p").first.is_visible()
    page.locator(".index a", has_text="30").press("Enter")
    page.wait_for_function("!document.querySelector('#f30').hidden")
    assert visible(page) == ["f30"]
    page.close()
