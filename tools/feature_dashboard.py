#!/usr/bin/env python3
"""A page about features of a sparse autoencoder of phase 3: when each is active, what it reads, and
what it writes.

    python tools/feature_dashboard.py saes/adaptive/L3    # the 50 features that write most
    python tools/feature_dashboard.py saes/adaptive/L3 --features 12 40 77 --out features.html

Reads   <sae folder> of site z; the dump and tokens.npy in --activations_dir; the checkpoint that
        they were made from; the template pages/features.html
Writes  --out, one HTML file that needs no network

For every feature: histogram of its activations, its top contexts (one a window, tokens shaded by
activation), the next tokens that its decoder direction raises and lowers, the share of each head in
what it writes, and, for its top context, from which source positions and heads the activation came:
its pre-activation is sum over heads h and positions s of a[h,t,s] <v[h,s], w_enc[h]>, plus a
constant. A description of harvested tokens, in windows spread over the dump; the SAE was trained on
most of their documents. No null, no interval; n is printed.

Shapes: N windows, T tokens a window, H heads, K d_head, D d_model, F latents, V vocabulary.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hero_head_analysis import (  # noqa: E402
    SAE,
    HandoffError,
    NewGPT,
    Say,
    alone,
    atomic,
    encode,
    find_checkpoint,
    head_share,
    letter_end,
    load_checkpoint,
    need_rows,
    one_line_errors,
    open_dump,
    open_sae,
    positive,
    read_sidecar,
    read_tokenizer,
    render_page,
    sha256,
    unembedding,
    visible_texts,
    write_basis,
)

HISTOGRAM_BINS = 30
N_CONTEXTS = 8  # windows shown a feature
TOKENS_BEFORE = 24  # of a context, before its peak
TOKENS_AFTER = 6
N_NEXT_TOKENS = 10  # that a feature raises, and that it lowers
N_SOURCES = 5  # source positions named below a context
WINDOWS_AT_ONCE = 32  # bounds the memory of encoding
OPEN_AT_START = 3  # features whose details are open when the page is


# ------------------------------------------------------------------------------- what is looked at
@dataclass
class Source:
    """An SAE with the model and the harvested tokens behind it."""

    model: NewGPT
    sae: SAE
    layer: int
    z: np.ndarray  # [N, T, H, K]
    idx: Tensor  # [N, T]
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


def open_source(
    folder: Path, activations: Path | None, model_path: Path | None, n_tokens: int
) -> Source:
    """Opens and checks everything; raises HandoffError."""
    weights = folder / "sae_weights.safetensors"
    train = "python train_sae.py --runs RUN --layers LAYER"
    side = read_sidecar(weights, "janus.sae/1", train)
    run_name = side["run"]
    layer = side["layer"]
    if side["site"] != "z":
        fact = f"{folder} is an SAE of site {side['site']}, expected z"
        raise HandoffError(f"{fact}: only there is a feature made of heads")
    dump = find_checkpoint(side["inputs"][0]["path"], side["inputs"][0]["sha256"], weights)
    if activations is not None:
        dump = activations / run_name / dump.name

    path = model_path or find_checkpoint(side["checkpoint"], side["checkpoint_sha256"], weights)
    model, ckpt = load_checkpoint(path, torch.device("cpu"), False)
    ckpt["path"] = path
    ckpt["sha256"] = sha256(path)

    harvest = f"python harvest_activations.py --model_path {path} --run_name {run_name}"
    harvest += f" --layers {layer}"
    sae = open_sae(weights, side["head"], ckpt, train)
    z = open_dump(dump, "janus.activations/1", ckpt, harvest)  # [tokens, H K]
    tokens = open_dump(dump.with_name("tokens.npy"), "janus.tokens/1", ckpt, harvest)  # [tokens]
    n_heads = model.cfg.n_heads
    d_head = model.cfg.d_head
    seq_len = model.cfg.seq_len
    n_dumped = len(z) // seq_len  # windows
    n_windows = min(n_dumped, n_tokens // seq_len)
    if n_windows < 1 or z.shape != (len(tokens), n_heads * d_head):
        fact = f"{dump} has shape {z.shape} beside {len(tokens)} tokens"
        expected = f"expected at least {seq_len} rows"
        raise HandoffError(f"{fact}; {expected}; remake both with: {harvest}")

    # Spread over the dump: its first windows would be those of a few documents
    chosen = np.arange(n_windows) * n_dumped // n_windows  # [N]
    n_kept = n_dumped * seq_len
    z = z[:n_kept].reshape(n_dumped, seq_len, n_heads, d_head)[chosen]  # [N, T, H, K]
    kept = tokens[:n_kept].reshape(n_dumped, seq_len)[chosen]  # [N, T]
    idx = torch.from_numpy(kept.astype(np.int64))
    facts = read_sidecar(dump, "janus.activations/1", harvest)
    windows = facts.get("windows", "its first ones")
    text = f"{n_windows:,} windows of the {facts['split']} split ({windows})"
    need_rows(int(idx.max()) + 1, model.cfg.vocab_size, path)
    tokenizer = read_tokenizer(path.with_name("tokenizer.json"))
    return Source(model, sae, layer, z, idx, text, partial(visible_texts, tokenizer))


# ---------------------------------------------------------------------------- method: edit here
@torch.no_grad()
def strongest(source: Source, n: int) -> list[int]:
    """The n features that write most to the residual stream: mean activation x norm(W_dec W_O)."""
    total = torch.zeros(source.sae.n_features)  # [F], sum of the activations
    for part in np.array_split(source.z, max(1, len(source.z) // 8)):
        total += encode(source.sae, torch.from_numpy(part.astype(np.float32))).sum((0, 1))
    basis = write_basis(source.model, source.layer)  # [H, K, K]
    written = torch.einsum("fhk,hjk->fhj", source.decoder(), basis).sum(1)  # [F, K]
    weight = total * written.norm(dim=-1)  # [F]
    n_active = int((weight > 0).sum())
    return weight.argsort(descending=True)[: min(n, n_active)].tolist()


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
    value = block.attn.qkv(residual, model.rope_cos[:n_keys], model.rope_sin[:n_keys])[2]
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


@dataclass
class Feature:
    """What the page shows of one feature."""

    number: int
    n_active: int  # tokens
    frequency: float  # share of all tokens
    largest: float  # activation
    counts: list[int]  # tokens a bin of the histogram of positive activations
    edges: list[float]  # of the bins, one more than counts
    contexts: list[list[Token]]  # the strongest first; values: activation
    origin: Origin
    heads: list[float]  # share of each head in what the feature writes
    raises: list[Token]  # next tokens whose logit the decoder raises most; values: logit
    lowers: list[Token]


def top_contexts(source: Source, activation: Tensor) -> list[list[Token]]:
    """The windows with the largest activations, each around its peak. `activation` [N, T]."""
    peak, where = activation.max(1)  # [N], [N]
    contexts = []
    for window in peak.topk(min(N_CONTEXTS, len(peak))).indices.tolist():
        if peak[window] <= 0:
            break
        place = int(where[window])
        first = max(0, place - TOKENS_BEFORE)
        end = min(activation.shape[1], place + TOKENS_AFTER + 1)
        words = source.say(source.idx[window].tolist())
        context = []
        for position in range(first, end):
            value = float(activation[window, position])
            context.append(Token(words[position], value, is_peak=position == place))
        contexts.append(context)
    return contexts


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
    shown = range(first, len(by_position))
    tokens = [Token(words[position], float(by_position[position])) for position in shown]
    places = []
    for position in by_position.abs().topk(min(N_SOURCES, len(by_position))).indices.tolist():
        contribution = float(by_position[position])
        letter = words[letter_end(words, position)]
        places.append(Place(letter, place - position, contribution))
    return Origin(tokens, places, part.sum(1).tolist())


def next_tokens(source: Source, logits: Tensor, sign: int) -> list[Token]:
    """The tokens whose logits [V] are largest (sign 1) or smallest (sign -1)."""
    ranked = (sign * logits).topk(N_NEXT_TOKENS).indices.tolist()
    return [Token(alone(source.say, token), float(logits[token])) for token in ranked]


@torch.no_grad()
def describe(source: Source, features: list[int]) -> list[Feature]:
    """Everything that the page shows of each feature, as plain numbers and strings."""
    activations = source.activations(features)  # [N, T, features]
    decoder = source.decoder()  # [F, H, K]
    share = head_share(decoder[features], write_basis(source.model, source.layer))  # [features, H]
    block: Any = source.model.blocks[source.layer]
    w_o = block.attn.w_o.weight.unflatten(1, decoder.shape[1:])  # [D, H, K]
    w_u = unembedding(source.model)  # [V, D]
    described = []
    for column, feature in enumerate(features):
        activation = activations[..., column]  # [N, T]
        counts, edges = np.histogram(activation[activation > 0].numpy(), HISTOGRAM_BINS)
        logits = w_u @ torch.einsum("dhk,hk->d", w_o, decoder[feature])  # [V]
        described.append(
            Feature(
                number=feature,
                n_active=int((activation > 0).sum()),
                frequency=float((activation > 0).float().mean()),
                largest=float(activation.max()),
                counts=counts.tolist(),
                edges=edges.tolist(),
                contexts=top_contexts(source, activation),
                origin=trace_peak(source, feature, activation),
                heads=share[column].tolist(),
                raises=next_tokens(source, logits, 1),
                lowers=next_tokens(source, logits, -1),
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


def render(title: str, about: str, features: list[Feature]) -> str:
    """The page; the template escapes all token text."""
    return render_page(
        "features.html",
        title=title,
        about=about,
        features=features,
        open_at_start=OPEN_AT_START,
        shade=shade,
        bar_heights=bar_heights,
        largest_size=largest_size,
    )


# ------------------------------------------------------------------------------------ command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=" ".join((__doc__ or "").partition("\n\n")[0].split()),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("sae", type=Path, help="folder of an SAE: saes/<run>/L<layer>, or .../H<head>")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--features", type=int, nargs="+", help="numbers of the features; none: the strongest"
    )
    which.add_argument("--top", type=positive(int), default=50, help="how many of those")
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
            fact = f"{args.sae} has features 0 to {n_latents - 1}"
            raise HandoffError(f"--features {feature}: {fact}")
    features = describe(source, args.features or strongest(source, args.top))
    about = (
        f"Layer {source.layer}, {n_latents:,} features; "
        f"{source.idx.numel():,} harvested tokens in {source.text}. "
        "A description: no null, no interval. "
        "Tokens are shaded by activation; point at one for its value."
    )
    page = render(f"Features of {args.sae}", about, features)
    with atomic(args.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{args.out}: {len(features)} features, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def main(argv: list[str] | None = None) -> int:
    return one_line_errors(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
