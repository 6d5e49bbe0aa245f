#!/usr/bin/env python3
"""A page about features of a sparse autoencoder of phase 3: what a feature is, which ones are
shown and why, where each is active, and what it writes.

    python tools/feature_dashboard.py saes/adaptive/L3    # features of the hero analysis, else
                                                          # 50 that are active on .1 to 5 %
    python tools/feature_dashboard.py saes/adaptive/L3 --features 12 40 77 --out features.html

Reads   <sae folder> of site z; the dump and tokens.npy in --activations_dir; the checkpoint that
        they were made from; hero_features.csv and hero_contexts.csv of phase 5, where they are of
        this SAE; its latent_stability.csv, if several seeds were trained; the templates
        features.html and features.js of pages/
Writes  --out, one HTML file that needs no network

For every feature: contexts from the strongest to the weakest fifth of its activations, the tokens
that it is strongest on, the next tokens that its decoder direction raises and lowers, what the loss
is without it (from phase 5), the share of each head in what it writes, a histogram, and from which
source positions and heads its largest activation came: its pre-activation is sum over heads h and
positions s of a[h,t,s] <v[h,s], w_enc[h]>, plus a constant. A description of harvested tokens, in
windows spread over the dump. Only the loss without a feature has an interval; n is printed.

Shapes: N windows, T tokens a window, H heads, K d_head, D d_model, F latents, V vocabulary.
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hero_head_analysis import (  # noqa: E402
    SAE,
    SAE_WEIGHTS,
    VISIBLE,
    HandoffError,
    NewGPT,
    Say,
    alone,
    atomic,
    encode,
    find_checkpoint,
    find_sae,
    head_share,
    integer,
    letter_end,
    load_checkpoint,
    name_of_sae,
    need_rows,
    one_line_errors,
    open_dump,
    open_sae,
    positive,
    read_sidecar,
    read_stability,
    read_tokenizer,
    render_page,
    sha256,
    three_digits,
    token_texts,
    unembedding,
    write_basis,
    write_weights,
)

SPARSE_FROM = 0.001  # of tokens: a feature that is active on fewer has few contexts
SPARSE_TO = 0.05  # of tokens: one that is active on more is called dense
BAND = f"{100 * SPARSE_FROM:.3g} to {100 * SPARSE_TO:.3g} %"
GROUPS = ["Strongest fifth", "Second fifth", "Third fifth", "Fourth fifth", "Weakest fifth"]
N_STRONGEST = 5  # contexts of the first of these groups
N_CONTEXTS = 3  # contexts of each other group
TOKENS_BEFORE = 24  # of a context, before its token
TOKENS_AFTER = 6
SNIPPET_BEFORE = 7  # tokens, in the index
N_NEXT_TOKENS = 10  # that a feature raises, and that it lowers
N_USUAL_TOKENS = 6  # that it is strongest on
N_SOURCES = 5  # source positions named below a context
HISTOGRAM_BINS = 30
WINDOWS_AT_ONCE = 32  # bounds the memory of encoding
HERO_FOLDER = "hero_analysis"  # where hero_head_analysis.py writes, beside the SAEs

# Signs for line ends and control characters only: a space is the ground between two borders
SIGNS = {code: sign for code, sign in VISIBLE.items() if code != ord(" ")}


# ------------------------------------------------------------------------------- what is looked at
@dataclass
class Source:
    """An SAE with the model and the harvested tokens behind it."""

    model: NewGPT
    sae: SAE
    run_name: str
    layer: int
    checkpoint_sha256: str
    z: np.ndarray  # [N, T, H, K]
    idx: Tensor  # [N, T]
    dump: np.ndarray  # [tokens, H K], what z was drawn from, not in memory
    text: str  # which text that is, in words
    say: Say

    def decoder(self) -> Tensor:
        """What each feature writes, [F, H, K]."""
        return self.sae.by_head(self.sae.weights["W_dec"], self.model.cfg.n_heads)

    def encoder(self, feature: int) -> Tensor:
        """What one feature reads, [H, K]."""
        return self.sae.by_head(self.sae.weights["W_enc"][:, feature], self.model.cfg.n_heads)

    def activations(self, features: list[int]) -> Tensor:
        """Activations of some features on every token, [N, T, features]."""
        parts = []
        for start in range(0, len(self.z), WINDOWS_AT_ONCE):
            z = self.z[start : start + WINDOWS_AT_ONCE].astype(np.float32)
            parts.append(encode(self.sae, torch.from_numpy(z), features))
        return torch.cat(parts)


def shown_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text of each token where it stands; a line end is a sign."""
    return [text.translate(SIGNS) for text in token_texts(tokenizer, ids)]


def open_source(
    folder: Path, activations: Path | None, model_path: Path | None, n_tokens: int
) -> Source:
    """Opens and checks everything; raises HandoffError."""
    train = "python train_sae.py --runs RUN --layers LAYER"
    weights = find_sae(folder, train) or folder / SAE_WEIGHTS
    side = read_sidecar(weights, "janus.sae/1", train)
    run_name = side["run"]
    layer = side["layer"]
    if side["site"] != "z":
        fact = f"{weights.parent} is an SAE of site {side['site']}, expected z"
        raise HandoffError(f"{fact}: only there is a feature made of heads")
    trained_on = side["inputs"][0]
    dump = find_checkpoint(trained_on["path"], trained_on["sha256"], weights)
    if activations is not None:
        dump = activations / run_name / dump.name

    path = model_path or find_checkpoint(side["checkpoint"], side["checkpoint_sha256"], weights)
    model, ckpt = load_checkpoint(path, torch.device("cpu"), False)
    ckpt["path"] = path
    ckpt["sha256"] = sha256(path)
    ckpt["bos"] = side.get("bos")  # what the SAE's windows begin with

    harvest = f"python harvest_activations.py --model_path {path} --run_name {run_name}"
    harvest += f" --layers {layer}"
    sae = open_sae(weights, side["head"], ckpt, train)
    z = open_dump(dump, "janus.activations/1", ckpt, harvest)  # [tokens, H K]
    tokens = open_dump(dump.with_name("tokens.npy"), "janus.tokens/1", ckpt, harvest)  # [tokens]
    windows = spread_windows(model, z, tokens, n_tokens, f"{dump}", harvest)
    need_rows(int(windows.idx.max()) + 1, model.cfg.vocab_size, path)

    facts = read_sidecar(dump, "janus.activations/1", harvest)
    where = facts.get("windows", "its first ones")
    text = f"{len(windows.idx):,} windows of the {facts['split']} split ({where})"
    if facts.get("sha256") == trained_on["sha256"]:
        text += ", most of which the SAE was trained on"
    say = partial(shown_texts, read_tokenizer(path.with_name("tokenizer.json")))
    return Source(
        model=model,
        sae=sae,
        run_name=run_name,
        layer=layer,
        checkpoint_sha256=ckpt["sha256"],
        z=windows.z,
        idx=windows.idx,
        dump=z,
        text=text,
        say=say,
    )


class Windows(NamedTuple):
    """Some whole windows of a dump."""

    z: np.ndarray  # [N, T, H, K]
    idx: Tensor  # [N, T]


def spread_windows(
    model: NewGPT, z: np.ndarray, tokens: np.ndarray, n_tokens: int, name: str, harvest: str
) -> Windows:
    """About n_tokens of a dump z [tokens, H K], in whole windows."""
    n_heads = model.cfg.n_heads
    d_head = model.cfg.d_head
    seq_len = model.cfg.seq_len
    n_dumped = len(z) // seq_len  # windows
    n_windows = min(n_dumped, n_tokens // seq_len)
    if n_windows < 1 or z.shape != (len(tokens), n_heads * d_head):
        fact = f"{name} has shape {z.shape} beside {len(tokens)} tokens"
        expected = f"expected at least {seq_len} rows"
        raise HandoffError(f"{fact}; {expected}; remake both with: {harvest}")

    # Spread over the dump: its first windows would be those of a few documents
    chosen = np.arange(n_windows) * n_dumped // n_windows  # [N]
    n_kept = n_dumped * seq_len
    by_window = z[:n_kept].reshape(n_dumped, seq_len, n_heads, d_head)[chosen]  # [N, T, H, K]
    kept = tokens[:n_kept].reshape(n_dumped, seq_len)[chosen]  # [N, T]
    return Windows(by_window, torch.from_numpy(kept.astype(np.int64)))


# --------------------------------------------------------------------------- what phase 5 measured
@dataclass
class Effect:
    """What the loss loses without the part that a feature writes through one head."""

    value: float  # nats a token
    low: float  # nan where the documents are too few, infinite where nothing bounds it
    high: float
    n: int  # documents
    tests: int  # intervals that hold together, with 95 %

    def is_off_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def is_bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass
class HeroStudy:
    """The features that hero_head_analysis.py took away, one at a time."""

    head: str  # "L3H1"
    effects: dict[int, Effect]  # by number of the feature
    own: list[int]  # the head's own features; the others are their twins

    def sentence(self) -> str:
        """What was measured, over how much."""
        if not self.effects:
            return "not measured: hero_head_analysis.py does it for the head that it studies"
        one = next(iter(self.effects.values()))
        return (
            f"without the part that it writes through head {self.head}, on {one.n} documents; "
            f"the intervals hold together for {one.tests} features, with 95 %"
        )


NO_STUDY = HeroStudy("", {}, [])
HERO_COLUMNS = ["role", "run", "layer", "head", "feature", "kind"]
HERO_COLUMNS += ["value", "ci_low", "ci_high", "n", "tests"]


def open_hero(source: Source, folder: Path) -> HeroStudy:
    """What phase 5 wrote to `folder` about features of this SAE. Raises HandoffError if that is
    missing, or of another SAE."""
    remedy = "python hero_head_analysis.py --ablation_csv CSV --saes_dir SAES"
    path = folder / "hero_features.csv"
    side = read_sidecar(path, "janus.hero/2", remedy)
    read_sidecar(folder / "hero_contexts.csv", "janus.hero/2", remedy)
    try:
        table = pd.read_csv(path)[HERO_COLUMNS]
        contexts = pd.read_csv(folder / "hero_contexts.csv")
        places = contexts[["feature", "activation", "window", "position"]]
    except (KeyError, ValueError) as e:
        raise HandoffError(
            f"{path} cannot be read ({str(e)[:120]}); remake it with: {remedy}"
        ) from None

    of_hero = table["role"] == "hero"
    of_layer = (table["run"] == source.run_name) & (table["layer"] == source.layer)
    table = table[of_hero & of_layer]
    is_same_model = side.get("checkpoint_sha256") == source.checkpoint_sha256
    if table.empty or not is_same_model or not has_activations(source, places):
        fact = f"{path} is of another layer, model, SAE or dump than {source.sae.folder}"
        raise HandoffError(f"{fact}; make it of this one with: {remedy}")

    effects = {}
    for row in table.itertuples():
        effects[row.feature] = Effect(row.value, row.ci_low, row.ci_high, row.n, row.tests)
    own = table.loc[table["kind"] == "hero", "feature"].tolist()
    head = f"L{source.layer}H{table['head'].iloc[0]}"
    return HeroStudy(head, effects, own)


def has_activations(source: Source, places: pd.DataFrame) -> bool:
    """Whether the features of this SAE have the activations of hero_contexts.csv where it says.

    The file does not name its SAE, so this tells by the content.
    """
    features = places["feature"]
    rows = places["window"] * source.model.cfg.seq_len + places["position"]
    if not len(rows) or rows.max() >= len(source.dump) or features.max() >= source.sae.n_features:
        return False
    shape = source.z.shape[2:]  # H, K
    z = torch.from_numpy(source.dump[rows.tolist()].astype(np.float32)).unflatten(1, shape)
    activation = encode(source.sae, z)  # [rows, F]
    here = activation[torch.arange(len(rows)), torch.tensor(features.tolist())]  # [rows]
    # Phase 5 may have computed in bfloat16
    return bool(np.allclose(here.numpy(), places["activation"], rtol=0.02, atol=1e-3))


def find_hero(source: Source, given: Path | None) -> HeroStudy:
    """The study in the folder `given`, or in one beside the SAE; an empty one if there is none."""
    if given is not None:
        return open_hero(source, given)
    for folder in source.sae.folder.resolve().parents[:6]:  # .../saes/RUN/LAYER/HEAD/k16/seed1
        if (folder / HERO_FOLDER / "hero_features.csv").is_file():
            try:
                return open_hero(source, folder / HERO_FOLDER)
            except HandoffError as e:
                print(f"without the hero analysis: {e}")
    return NO_STUDY


# ---------------------------------------------------------------------------- method: edit here
@dataclass
class Survey:
    """All features of the SAE on the tokens looked at."""

    frequency: Tensor  # [F], share of tokens on which each is active
    # [F], what it writes to the residual stream: mean activation x norm(W_dec W_O), before a norm
    # that follows attention divides it by its rms
    written: Tensor
    mean_active: float  # features a token

    def is_sparse(self) -> Tensor:
        return (self.frequency >= SPARSE_FROM) & (self.frequency <= SPARSE_TO)  # [F]


@torch.no_grad()
def survey(source: Source) -> Survey:
    """How often each feature is active, and how much it writes."""
    total = torch.zeros(source.sae.n_features)  # [F], sum of the activations
    n_active = torch.zeros(source.sae.n_features)  # [F], tokens
    for part in np.array_split(source.z, max(1, len(source.z) // 8)):
        activation = encode(source.sae, torch.from_numpy(part.astype(np.float32)))  # [n, T, F]
        total += activation.sum((0, 1))
        n_active += (activation > 0).sum((0, 1))
    n_tokens = source.idx.numel()
    basis = write_basis(source.model, source.layer)  # [H, K, K]
    written = torch.einsum("fhk,hjk->fhj", source.decoder(), basis).sum(1)  # [F, K]
    weight = total / n_tokens * written.norm(dim=-1)  # [F]
    return Survey(n_active / n_tokens, weight, float(n_active.sum() / n_tokens))


def strongest(found: Survey, n: int, among: Tensor) -> list[int]:
    """The n features that write most, of those in the mask `among` [F] that are active at all."""
    weight = found.written * among
    n_possible = int((weight > 0).sum())
    return weight.argsort(descending=True)[: min(n, n_possible)].tolist()


@dataclass
class Choice:
    """The features of the page, in their order, and why these: a sentence."""

    features: list[int]
    why: str


def choose(found: Survey, study: HeroStudy, n: int) -> Choice:
    """At most n features: those of the hero analysis, else the sparse ones, else any."""
    if study.own:
        return by_effect(study, n)
    is_sparse = found.is_sparse()
    n_sparse = int(is_sparse.sum())
    features = strongest(found, n, is_sparse)
    if not features:
        everything = torch.ones_like(is_sparse)
        features = strongest(found, n, everything)
        why = f"No feature is active on {BAND} of tokens, so these are shown however often they "
        return Choice(features, f"{why}are active: the {len(features)} that write most.")
    if len(features) == n_sparse:
        why = f"Shown are all {n_sparse} that are active on {BAND} of tokens"
    else:
        why = f"Shown are {len(features)} of the {n_sparse:,} that are active on {BAND} of tokens"
    return Choice(features, f"{why}: those that write most to the residual stream come first.")


def by_effect(study: HeroStudy, n: int) -> Choice:
    """At most n of the hero's own features: those with an effect first, then the larger ones."""

    def rank(feature: int) -> tuple[bool, float]:
        effect = study.effects[feature]
        return (not effect.is_off_zero(), -abs(effect.value))

    features = sorted(study.own, key=rank)[:n]
    count = f"are {len(features)} features" if len(features) > 1 else "is the one feature"
    why = f"Shown {count} of head {study.head} that the hero analysis took away, one at a time. "
    why += "Those with an effect on the loss that is told from 0 come first, then the larger ones."
    return Choice(features, why)


@torch.no_grad()
def sources(source: Source, feature: int, window: int, position: int) -> Tensor:
    """Contribution of each head and source position to the pre-activation of a feature at
    `position` of `window`: [H, position + 1].

    Their sum is <w_enc, z>, which differs from the pre-activation by the SAE's constants only.
    """
    model: Any = source.model
    layer = source.layer
    block = model.blocks[layer]
    n_keys = position + 1
    idx = source.idx[window : window + 1, :n_keys]  # [1, keys]
    tap: dict[str, Any] = {f"resid_pre.{layer}": None, f"pattern.{layer}": None}
    model.run_blocks(model.embed(idx), stop=layer + 1, tap=tap)
    residual = block.norm_attn(tap[f"resid_pre.{layer}"])  # [1, keys, D]
    attention = tap[f"pattern.{layer}"][0, :, position]  # [H, keys]
    value = block.attn.qkv(residual, *model.rotary(layer, n_keys))[2]  # [1, H, keys, K]
    read = torch.einsum("hsk,hk->hs", value[0], source.encoder(feature))  # [H, keys]
    return attention * read


class Token(NamedTuple):
    """A token of the page with a number: its activation, contribution or logit."""

    text: str
    value: float
    is_peak: bool = False  # the token for which a context is shown


class Place(NamedTuple):
    """A source position of an activation."""

    text: str
    back: int  # tokens before the activation
    value: float  # contribution to the pre-activation


@dataclass
class Origin:
    """Where the largest activation of a feature came from."""

    tokens: list[Token]  # the context up to the activation; values: contribution, all heads
    places: list[Place]  # the largest contributions in size
    by_head: list[float]  # contribution of each head, all positions


class Context(NamedTuple):
    """A token on which a feature is active, with the text around it."""

    activation: float
    tokens: list[Token]  # values: activation


@dataclass
class Group:
    """A fifth of the tokens on which a feature is active, and some of them in context."""

    name: str
    largest: float  # activation
    smallest: float
    n: int  # tokens
    contexts: list[Context]


class UsualToken(NamedTuple):
    """A token that is common where a feature is strongest."""

    text: str
    share: float  # of the tokens of the strongest fifth
    everywhere: float  # of all tokens: what it would be if the feature had no preference


@dataclass
class Feature:
    """What the page shows of one feature."""

    number: int
    n_active: int  # tokens
    frequency: float  # share of all tokens
    largest: float  # activation
    groups: list[Group]  # the strongest first
    usual: list[UsualToken]
    counts: list[int]  # tokens a bin of the histogram of positive activations
    edges: list[float]  # of the bins, one more than counts
    origin: Origin
    heads: list[float]  # share of each head in what the feature writes
    raises: list[Token]  # next tokens whose logit the decoder raises most; values: logit
    lowers: list[Token]
    effect: Effect | None = None  # None: phase 5 did not take it away
    # Cosine with its partners of other seeds; NaN: it has none, None: no other seed was trained
    stability: float | None = None

    @property
    def is_dense(self) -> bool:
        return self.frequency > SPARSE_TO

    @property
    def main_head(self) -> int:
        return int(np.argmax(self.heads))


def letters(words: list[str], first: int, end: int) -> list[slice]:
    """The tokens from first to end, tokens that make one letter together in one slice; the last
    slice goes on until its letter is whole."""
    slices = []
    start = first
    for position in range(first, len(words)):
        if words[position]:
            slices.append(slice(start, position + 1))
            start = position + 1
        if start >= end:
            break
    return slices


def around(source: Source, activation: Tensor, window: int, place: int) -> Context:
    """The text around one token. `activation` [N, T]."""
    words = source.say(source.idx[window].tolist())
    first = max(0, place - TOKENS_BEFORE)
    end = min(len(words), place + TOKENS_AFTER + 1)
    tokens = []
    for letter in letters(words, first, end):
        is_peak = letter.start <= place < letter.stop
        value = activation[window, place] if is_peak else activation[window, letter].max()
        tokens.append(Token(words[letter.stop - 1], float(value), is_peak))
    return Context(float(activation[window, place]), tokens)


def ranked_tokens(activation: Tensor) -> Tensor:
    """The tokens on which a feature is active, the strongest first, as numbers in the flattened
    activation [N, T]."""
    flat = activation.flatten()  # [N T]
    return flat.argsort(descending=True, stable=True)[: int((flat > 0).sum())]


def spread(ranked: list[int], n: int, seq_len: int) -> list[int]:
    """About n of the ranked tokens, in the middle of n equal parts; no two of one window."""
    chosen: list[int] = []
    windows: set[int] = set()
    for part in range(n):
        start = (2 * part + 1) * len(ranked) // (2 * n)
        free = (token for token in ranked[start:] if token // seq_len not in windows)
        token = next(free, None)
        if token is not None:
            chosen.append(token)
            windows.add(token // seq_len)
    return chosen


def top(ranked: list[int], n: int, seq_len: int) -> list[int]:
    """The first n of the ranked tokens, one a window."""
    of_window: dict[int, int] = {}
    for token in ranked:
        of_window.setdefault(token // seq_len, token)
        if len(of_window) == n:
            break
    return list(of_window.values())


def group_contexts(source: Source, activation: Tensor) -> list[Group]:
    """Contexts from the strongest to the weakest activation [N, T], in five groups of as many
    tokens. Of the first the strongest are shown, of the others some at equal steps of rank."""
    seq_len = activation.shape[1]
    ranked = ranked_tokens(activation)
    few = len(ranked) < len(GROUPS)
    names = ["All"] if few else GROUPS
    groups = []
    for name, part in zip(names, ranked.tensor_split(len(names)), strict=True):
        if not len(part):
            continue
        group = part.tolist()
        is_first = not groups
        shown = top(group, N_STRONGEST, seq_len) if is_first else spread(group, N_CONTEXTS, seq_len)
        contexts = [around(source, activation, *divmod(token, seq_len)) for token in shown]
        value = activation.flatten()[part]  # [tokens of the group]
        groups.append(Group(name, float(value[0]), float(value[-1]), len(part), contexts))
    return groups


def usual_tokens(source: Source, activation: Tensor) -> list[UsualToken]:
    """The commonest tokens of the strongest fifth of a feature's activations [N, T]."""
    ranked = ranked_tokens(activation)
    n_fifth = math.ceil(len(ranked) / len(GROUPS))
    ids = source.idx.flatten()  # [N T]
    counts = Counter(ids[ranked[:n_fifth]].tolist())
    usual = []
    for token, count in counts.most_common(N_USUAL_TOKENS):
        everywhere = float((ids == token).float().mean())
        usual.append(UsualToken(alone(source.say, token), count / n_fifth, everywhere))
    return usual


def trace_peak(source: Source, feature: int, activation: Tensor) -> Origin:
    """Where the largest of a feature's activations [N, T] came from; zeros if there is none."""
    peak, where = activation.max(1)  # [N], [N]
    window = int(peak.argmax())
    place = int(where[window])
    if peak[window] > 0:
        part = sources(source, feature, window, place)  # [H, place + 1]
    else:
        part = torch.zeros(source.model.cfg.n_heads, 1)
    by_position = part.sum(0)  # [place + 1]
    words = source.say(source.idx[window].tolist())

    first = max(0, place - TOKENS_BEFORE)
    tokens = []
    for letter in letters(words, first, len(by_position)):
        text = words[letter.stop - 1]
        is_peak = letter.start <= place < letter.stop
        tokens.append(Token(text, float(by_position[letter].sum()), is_peak))
    places = []
    for position in by_position.abs().topk(min(N_SOURCES, len(by_position))).indices.tolist():
        contribution = float(by_position[position])
        letter_text = words[letter_end(words, position)]
        places.append(Place(letter_text, place - position, contribution))
    return Origin(tokens, places, part.sum(1).tolist())


def next_tokens(source: Source, logits: Tensor, sign: int) -> list[Token]:
    """The tokens whose logits [V] are largest (sign 1) or smallest (sign -1)."""
    ranked = (sign * logits).topk(N_NEXT_TOKENS).indices.tolist()
    return [Token(alone(source.say, token), float(logits[token])) for token in ranked]


@torch.no_grad()
def describe(source: Source, features: list[int], study: HeroStudy = NO_STUDY) -> list[Feature]:
    """Everything that the page shows of each feature, as plain numbers and strings."""
    activations = source.activations(features)  # [N, T, features]
    decoder = source.decoder()  # [F, H, K]
    share = head_share(decoder[features], write_basis(source.model, source.layer))  # [features, H]
    w_o = write_weights(source.model, source.layer)  # [D, H, K]
    w_u = unembedding(source.model)  # [V, D]
    stability = read_stability(source.sae)  # [F]
    described = []
    for column, feature in enumerate(features):
        activation = activations[..., column]  # [N, T]
        positive = activation[activation > 0].numpy()
        # Around a single value NumPy would put bins below 0
        is_single = len(positive) > 0 and positive.min() == positive.max()
        bounds = (0.0, float(positive[0])) if is_single else None
        counts, edges = np.histogram(positive, HISTOGRAM_BINS, range=bounds)
        logits = w_u @ torch.einsum("dhk,hk->d", w_o, decoder[feature])  # [V]
        described.append(
            Feature(
                number=feature,
                n_active=int((activation > 0).sum()),
                frequency=float((activation > 0).float().mean()),
                largest=float(activation.max()),
                groups=group_contexts(source, activation),
                usual=usual_tokens(source, activation),
                counts=counts.tolist(),
                edges=edges.tolist(),
                origin=trace_peak(source, feature, activation),
                heads=share[column].tolist(),
                raises=next_tokens(source, logits, 1),
                lowers=next_tokens(source, logits, -1),
                effect=study.effects.get(feature),
                stability=None if stability is None else stability[feature].item(),
            )
        )
    return described


# ---------------------------------------------------------------------------------------- the page
def shade(value: float, largest: float) -> float:
    """How deep the ground of a token is, 0 to 1: the size of its value beside the largest."""
    return min(1.0, abs(value) / largest) if largest else 0.0


def bar_heights(counts: list[int]) -> list[float]:
    """Heights of the bars, 0 to 1, on a logarithmic axis: log(1 + tokens)."""
    tallest = max(np.log1p(max(counts)), 1e-9)
    return [float(np.log1p(count) / tallest) for count in counts]


def largest_size(tokens: list[Token]) -> float:
    return max((abs(token.value) for token in tokens), default=0.0)


def snippet(context: Context) -> list[Token]:
    """The tokens next to the one that the context is about."""
    peak = [token.is_peak for token in context.tokens].index(True)
    return context.tokens[max(0, peak - SNIPPET_BEFORE) : peak + 3]


def percent(share: float) -> str:
    return f"{three_digits(float(f'{100 * share:.3g}'))} %"


def in_millinats(effect: Effect) -> str:
    """An effect with its interval, as text: "+7.1 [2.19, 16.2]"."""
    value = f"{1000 * effect.value:+.3g}"
    if math.isnan(effect.low):
        return f"{value} [no interval]"
    low = f"{1000 * effect.low:.3g}".replace("inf", "∞")
    high = f"{1000 * effect.high:.3g}".replace("inf", "∞")
    return f"{value} [{low}, {high}]"


def millinats(effect: Effect) -> str:
    return f"{in_millinats(effect)} millinats a token"


def effect_in_words(effect: Effect) -> str:
    """What the loss does without a feature, as a sentence about it."""
    if math.isnan(effect.low):
        found = f"{1000 * effect.value:+.3g} millinats a token"
        return f"Cannot tell: {found}, and {effect.n} documents are too few for an interval."
    if effect.low > 0:
        return f"The loss rises: {millinats(effect)}."
    if effect.high < 0:
        return f"The loss falls: {millinats(effect)}."
    if effect.is_bounded():
        return f"No effect that can be told from 0: {millinats(effect)}."
    return f"Cannot tell: {millinats(effect)}; {effect.n} documents bound it on one side at most."


def what_a_feature_is(source: Source, found: Survey) -> str:
    """One paragraph for somebody who has never seen one."""
    writer = "the attention heads"
    if not source.sae.reads_whole_layer:
        writer = f"attention head H{source.sae.head}"
    few = three_digits(float(f"{found.mean_active:.3g}"))
    return (
        f"A feature is a direction in the output of {writer} of layer {source.layer}, and its "
        f"activation says how far the output of a token goes along it. A sparse autoencoder (SAE) "
        f"learned {source.sae.n_features:,} of them, so that a few at a time, here {few} a token, "
        f"approximate that output."
    )


def how_often(frequency: Tensor, n_tokens: int) -> str:
    """How many of all features are active how often. `frequency` [F]."""
    n_never = int((frequency == 0).sum())
    n_rare = int(((frequency > 0) & (frequency < SPARSE_FROM)).sum())
    n_dense = int((frequency > SPARSE_TO).sum())
    n_sparse = len(frequency) - n_never - n_rare - n_dense
    return (
        f"Of the {len(frequency):,}, {n_sparse:,} are active on {BAND} of the {n_tokens:,} tokens "
        f"looked at, {n_dense:,} on more (dense), {n_rare:,} on fewer and {n_never:,} on none."
    )


def how_dense(features: list[Feature]) -> str:
    """How many of the features shown are dense, and what that means; empty if none is."""
    n_dense = sum(feature.is_dense for feature in features)
    if not n_dense:
        return ""
    count = "All" if n_dense == len(features) else f"Of those shown, {n_dense}"
    if n_dense == 1:
        count = "One of those shown"
    verb = "is" if n_dense == 1 else "are"
    return f"{count} {verb} dense: a few contexts cannot say what such a feature stands for."


def effects_in_words(features: list[Feature], head: str) -> str:
    """What the loss does without the features shown: for how many it rises, falls, or neither."""
    effects = {}
    for feature in features:
        if feature.effect is not None:
            effects[feature.number] = feature.effect
    if not effects:
        return "What the loss would be without a feature was not measured for these."

    n = len(effects)
    risen = [number for number, effect in effects.items() if effect.low > 0]
    fallen = [number for number, effect in effects.items() if effect.high < 0]
    unknown = [e for e in effects.values() if not (e.is_off_zero() or e.is_bounded())]
    n_null = n - len(risen) - len(fallen) - len(unknown)
    said = []
    for verb, numbers in {"rises": risen, "falls": fallen}.items():
        if numbers:
            largest = max(numbers, key=lambda number: abs(effects[number].value))
            which = "feature" if len(numbers) == 1 else "most for feature"
            said.append(
                f"Without what one of them writes through head {head}, the loss {verb} for "
                f"{len(numbers)} of the {n} ({which} {largest}: {millinats(effects[largest])})."
            )
    if risen or fallen:
        together = max(effect.tests for effect in effects.values())
        said.append(f"The intervals hold together for {together} features, with 95 %.")
    if n_null == n:
        said.append(f"For none of the {n} can an effect on the loss be told from 0.")
    elif n_null:
        said.append(f"For {n_null} no effect can be told from 0.")
    if unknown:
        said.append(f"For {len(unknown)} of the {n} one cannot tell: too few documents.")
    return " ".join(said)


def first_screen(
    source: Source, found: Survey, choice: Choice, shown: list[Feature], head: str
) -> list[str]:
    """The paragraphs that say what is on the page."""
    limits = (
        "Contexts show where a feature is active; they do not prove what it means, and there is no "
        f"null for them. They are of {source.text}."
    )
    often = how_often(found.frequency, source.idx.numel())
    return [
        f"{what_a_feature_is(source, found)} {often}",
        f"{choice.why} {effects_in_words(shown, head)} {how_dense(shown)}".strip(),
        limits,
    ]


def render(
    title: str, about: list[str], features: list[Feature], facts: dict[str, str] | None = None
) -> str:
    """The page: `about` are its first paragraphs, `facts` its last lines. The template escapes all
    text."""
    return render_page(
        "features.html",
        title=title,
        about=about,
        features=features,
        facts=facts or {},
        shade=shade,
        bar_heights=bar_heights,
        largest_size=largest_size,
        percent=percent,
        snippet=snippet,
        in_millinats=in_millinats,
        effect_in_words=effect_in_words,
    )


# ------------------------------------------------------------------------------------ command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=" ".join((__doc__ or "").partition("\n\n")[0].split()),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    sae = "folder of an SAE: saes/<run>/L<layer>, or .../H<head>; with several below it (L3/k16/"
    sae += "seed1) the one nearest to the default setting and seed of train_sae.py"
    add("sae", type=Path, help=sae)
    which = parser.add_mutually_exclusive_group()
    numbers = "numbers of the features; none: those of the hero analysis, else those that are "
    numbers += f"active on {BAND.replace('%', '%%')} of tokens"
    which.add_argument("--features", type=integer, nargs="+", help=numbers)
    which.add_argument("--top", type=positive(int), default=50, help="at most how many of those")
    sparse = "those that are active on so many tokens, also where there is a hero analysis"
    add("--sparse", action="store_true", help=sparse)
    study = f"where hero_head_analysis.py wrote; none: {HERO_FOLDER}/ beside the SAEs, if there"
    add("--hero_dir", type=Path, help=study)
    tokens = "harvested tokens to look at, in whole windows spread over the dump"
    add("--tokens", type=positive(int), default=65_536, help=tokens)
    place = "where harvest_activations.py wrote; none: where the SAE says"
    add("--activations_dir", type=Path, help=place)
    add("--model_path", type=Path, help="checkpoint; none: where the SAE says")
    out = "the page; replaced if it is there"
    add("--out", type=Path, default=Path("features.html"), help=out)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    source = open_source(args.sae, args.activations_dir, args.model_path, args.tokens)
    n_latents = source.sae.n_features
    for feature in args.features or []:
        if not 0 <= feature < n_latents:
            fact = f"{source.sae.folder} has features 0 to {n_latents - 1}"
            raise HandoffError(f"--features {feature}: {fact}")
    study = find_hero(source, args.hero_dir)
    found = survey(source)
    if args.features:
        count = f"are the {len(args.features)}" if len(args.features) > 1 else "is the one"
        choice = Choice(args.features, f"Shown {count} asked for.")
    else:
        choice = choose(found, NO_STUDY if args.sparse else study, args.top)
    features = describe(source, choice.features, study)

    whose = f"layer {source.layer}"
    if not source.sae.reads_whole_layer:
        whose = f"head L{source.layer}H{source.sae.head}"
    title = f"Features of {whose}, run {source.run_name}"
    nearest = ""
    if source.sae.folder != args.sae:
        nearest = f"; of those in {args.sae} the one nearest to the defaults of train_sae.py"
    facts = {
        "SAE": f"{name_of_sae(source.sae)}, {n_latents:,} features{nearest}",
        "Text": f"{source.idx.numel():,} tokens: {source.text}",
        "Loss without a feature": study.sentence(),
        "Command": " ".join(["python", *sys.argv]),
    }
    about = first_screen(source, found, choice, features, study.head)
    page = render(title, about, features, facts)
    with atomic(args.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{args.out}: {len(features)} features, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
