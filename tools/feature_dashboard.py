#!/usr/bin/env python3
"""A page about features of a sparse autoencoder of phase 3: when each is active, what it reads, and what it writes.

    python tools/feature_dashboard.py saes/adaptive/L3                              # the 50 features that write most
    python tools/feature_dashboard.py saes/adaptive/L3 --features 12 40 77 --out features.html

Reads   <sae folder> of site z; the dump and tokens.npy in --activations_dir; the checkpoint that they were made from
Writes  --out, one HTML file that needs no network

For every feature: histogram of its activations, its top contexts (one a window, tokens shaded by activation), the next tokens that
its decoder direction raises and lowers, the share of each head in what it writes, and, for its top context, from which source
positions and heads the activation came: its pre-activation is sum over heads h and positions s of a[h,t,s] <v[h,s], w_enc[h]>,
plus a constant. A description of the harvested tokens: no null, no interval, and n is printed.
"""

import argparse
import html
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hero_head_analysis import (  # noqa: E402
    HandoffError,
    NewGPT,
    atomic,
    encode,
    head_share,
    load_checkpoint,
    one_line_errors,
    open_dump,
    positive,
    read_sidecar,
    sha256,
    token_text,
    unembedding,
    write_basis,
)

BINS, CONTEXTS, BEFORE, AFTER, WORDS = 30, 8, 24, 6, 10


@dataclass
class Source:
    """An SAE with the model and the harvested tokens behind it."""

    model: NewGPT
    sae: dict[str, Any]  # as hero_head_analysis.encode takes it
    layer: int
    z: np.ndarray  # [windows, T, H, K]
    idx: Tensor  # [windows, T]
    say: Any  # token id -> text

    def decoder(self) -> Tensor:
        """W_dec by head, [F, H, K]; an SAE of one head writes nothing elsewhere."""
        w, h, n = self.sae["W_dec"], self.sae["head"], self.model.cfg.n_heads
        return w.unflatten(1, (n, -1)) if h is None else F.pad(w[:, None], (0, 0, h, n - 1 - h))

    def encoder(self, f: int) -> Tensor:
        """Encoder of one feature by head, [H, K]."""
        w, h, n = self.sae["W_enc"][:, f], self.sae["head"], self.model.cfg.n_heads
        return w.unflatten(0, (n, -1)) if h is None else F.pad(w[None], (0, 0, h, n - 1 - h))

    def activations(self, features: Any) -> Tensor:
        """[windows, T, features]."""
        parts = (torch.from_numpy(self.z[i : i + 32].astype(np.float32)) for i in range(0, len(self.z), 32))
        return torch.cat([encode(self.sae, part, features) for part in parts])


def open_source(folder: Path, activations: Path | None, model_path: Path | None, n_tokens: int) -> Source:
    """Opens and checks everything; raises HandoffError."""
    train = "python train_sae.py --runs RUN --layers LAYER"
    side = read_sidecar(folder / "sae_weights.safetensors", "janus.sae/1", train)
    if side["site"] != "z":
        raise HandoffError(f"{folder} is an SAE of site {side['site']}, expected z: only there is a feature made of heads")
    dump = Path(side["inputs"][0]["path"])
    dump = dump if activations is None else activations / side["run"] / dump.name
    path = Path(model_path or side["checkpoint"])
    model, ckpt = load_checkpoint(path, torch.device("cpu"), False)
    ckpt |= dict(path=path, sha256=sha256(path))
    harvest = f"python harvest_activations.py --model_path {path} --run_name {side['run']} --layers {side['layer']}"
    sae = open_dump(folder / "sae_weights.safetensors", "janus.sae/1", ckpt, train) | dict(head=side["head"])
    z, tokens = (
        open_dump(dump, "janus.activations/1", ckpt, harvest),
        open_dump(dump.with_name("tokens.npy"), "janus.tokens/1", ckpt, harvest),
    )
    c, t = model.cfg, model.cfg.seq_len
    n = min(len(z), n_tokens) // t
    if n < 1 or z.shape != (len(tokens), c.n_heads * c.d_head):
        raise HandoffError(
            f"{dump} has shape {z.shape} beside {len(tokens)} tokens; expected at least {t} rows; remake both with: {harvest}"
        )
    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    idx = torch.from_numpy(np.asarray(tokens[: n * t]).astype(np.int64)).view(n, t)
    return Source(model, sae, side["layer"], z[: n * t].reshape(n, t, c.n_heads, c.d_head), idx, cache(partial(token_text, tokenizer)))


@torch.no_grad()
def strongest(src: Source, n: int) -> list[int]:
    """The n features that write most to the residual stream: mean activation x norm(W_dec W_O)."""
    total = sum(
        encode(src.sae, torch.from_numpy(part.astype(np.float32))).sum((0, 1)) for part in np.array_split(src.z, max(1, len(src.z) // 8))
    )
    size = torch.einsum("fhk,hjk->fhj", src.decoder(), write_basis(src.model, src.layer)).sum(1).norm(dim=-1)
    weight = total * size
    return weight.argsort(descending=True)[: min(n, int((weight > 0).sum()))].tolist()


@torch.no_grad()
def sources(src: Source, f: int, window: int, position: int) -> Tensor:
    """Contribution of each head and source position to the pre-activation of feature f at `position` of `window`: [H, position + 1].

    Their sum is <w_enc, z>, which differs from the pre-activation by the SAE's constants only.
    """
    block: Any = src.model.blocks[src.layer]
    tap: dict[str, Any] = {f"{site}.{src.layer}": None for site in ("resid_pre", "pattern")}
    x = src.idx[window : window + 1, : position + 1]
    src.model.run_blocks(src.model.embed(x), stop=src.layer + 1, tap=tap)
    resid, a = tap[f"resid_pre.{src.layer}"], tap[f"pattern.{src.layer}"]
    t = position + 1
    v = block.attn.qkv(block.norm_attn(resid), src.model.rope_cos[:t], src.model.rope_sin[:t])[2]  # [1, H, t, K]
    return a[0, :, position] * torch.einsum("hsk,hk->hs", v[0], src.encoder(f))


@torch.no_grad()
def describe(src: Source, features: list[int]) -> list[dict[str, Any]]:
    """Everything that the page shows of each feature, as plain numbers and strings."""
    out, act, w = [], src.activations(features), src.decoder()
    basis, u = write_basis(src.model, src.layer), unembedding(src.model)
    share = head_share(w[features], basis)
    w_o = src.model.blocks[src.layer].attn.w_o.weight.unflatten(1, w.shape[1:])  # type: ignore[union-attr]
    for j, f in enumerate(features):
        a = act[..., j]
        counts, edges = np.histogram(a[a > 0].numpy(), BINS)
        logits = u @ torch.einsum("dhk,hk->d", w_o, w[f])
        peak, where = a.max(1)
        contexts = []
        for i in peak.topk(min(CONTEXTS, len(peak))).indices.tolist():
            if peak[i] <= 0:
                break
            s = int(where[i])
            span = range(max(0, s - BEFORE), min(a.shape[1], s + AFTER + 1))
            contexts.append([(src.say(int(src.idx[i, p])), float(a[i, p]), p == s) for p in span])
        best = int(peak.argmax())
        s = int(where[best])
        part = sources(src, f, best, s) if peak[best] > 0 else torch.zeros(w.shape[1], 1)
        by_place, first = part.sum(0), max(0, s - BEFORE)
        top = by_place.abs().topk(min(5, len(by_place))).indices.tolist()
        places = [(src.say(int(src.idx[best, p])), s - p, float(by_place[p])) for p in top]
        origin = [(src.say(int(src.idx[best, p])), float(by_place[p])) for p in range(first, part.shape[1])]
        words = {
            k: [(src.say(int(i)), float(logits[i])) for i in x.topk(WORDS).indices] for k, x in (("raises", logits), ("lowers", -logits))
        }
        numbers = dict(feature=f, n_active=int((a > 0).sum()), frequency=float((a > 0).float().mean()), largest=float(a.max()))
        numbers |= dict(counts=counts.tolist(), edges=edges.tolist(), heads=share[j].tolist(), by_head=part.sum(1).tolist())
        out.append(numbers | dict(contexts=contexts, origin=origin, places=places) | words)
    return out


# --------------------------------------------------------------------------------------------------------- the page
def shaded(text: str, value: float, largest: float, mark: bool = False) -> str:
    """A token on a ground as deep as its value; blue: positive, orange: negative."""
    colour = "0,114,178" if value >= 0 else "213,94,0"
    depth = min(1.0, abs(value) / largest) if largest else 0.0
    style = f"background:rgba({colour},{0.75 * depth:.2f})" if depth > 0.01 else ""
    return f'<span title="{value:.4g}" style="{style}"{" class=peak" if mark else ""}>{html.escape(text)}</span>'


def histogram(counts: list[int], edges: list[float]) -> str:
    """Counts on a logarithmic axis, as SVG."""
    top = np.log1p(max(counts)) if counts else 1.0
    bars = "".join(
        f'<rect x="{10 * i}" y="{60 - 60 * np.log1p(n) / max(top, 1e-9):.1f}" width="9" height="{60 * np.log1p(n) / max(top, 1e-9):.1f}">'
        f"<title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {n} tokens</title></rect>"
        for i, n in enumerate(counts)
    )
    label = f"activations from {edges[0]:.3g} to {edges[-1]:.3g}; tallest bar {max(counts)} tokens, logarithmic"
    return f'<svg viewBox="0 0 {10 * len(counts)} 60" role="img" aria-label="{label}">{bars}</svg><small>{label}</small>'


def render(title: str, about: str, rows: list[dict[str, Any]]) -> str:
    """The page; all token text is escaped."""
    body = []
    for r in rows:
        contexts = "".join(f"<p class=ctx>{''.join(shaded(t, v, r['largest'], m) for t, v, m in c)}</p>" for c in r["contexts"])
        most = max((abs(v) for _, v in r["origin"]), default=0.0)
        origin = "".join(shaded(t, v, most) for t, v in r["origin"])
        places = "; ".join(f"“{html.escape(t)}”, {back} back, {v:+.3g}" for t, back, v in r["places"])
        words = ""
        for k in ("raises", "lowers"):
            tokens = " ".join(f'<code title="{v:.3g}">{html.escape(t)}</code>' for t, v in r[k])
            words += f"<p><b>{k}</b> {tokens}</p>"
        heads = "".join(
            f'<tr><td>H{h}</td><td><i style="width:{8 * s:.2f}rem"></i> {s:.0%}</td><td>{v:+.3g}</td></tr>'
            for h, (s, v) in enumerate(zip(r["heads"], r["by_head"], strict=True))
        )
        active = f"active on {r['n_active']} tokens ({100 * r['frequency']:.3g}% of all), up to {r['largest']:.3g}"
        body.append(
            f'<details id="f{r["feature"]}" {"open" if len(body) < 3 else ""}><summary>Feature {r["feature"]}: {active}</summary>'
            f"<div class=two><div>{histogram(r['counts'], r['edges'])}{words}<table><tr><th>head<th>share of what it writes"
            f"<th>of the activation below</tr>{heads}</table></div>"
            f"<div><h4>Top contexts</h4>{contexts or '<p>never active here</p>'}<h4>Where the activation of the first one came from</h4>"
            f"<p class=ctx>{origin}</p><small>blue adds, orange takes away; largest: {places}</small></div></div>"
            "</details>"
        )
    head = f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"
    start = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{STYLE}<title>{html.escape(title)}</title></head>'
    return f"{start}<body>{head}{''.join(body)}</body></html>"


STYLE = """<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root{color-scheme:light dark}body{max-width:72rem;margin:0 auto;padding:1rem;font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
details{border-bottom:1px solid #8886;padding:.4rem 0}summary{cursor:pointer;font-weight:600}h4{margin:.6rem 0 .2rem}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}.two>div{min-width:0}
.ctx{margin:.2rem 0;line-height:1.7}.peak{outline:2px solid currentColor}svg{width:100%;height:5rem;display:block}rect{fill:#0072b2}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.05rem .5rem;text-align:left;font-weight:400}
i{display:inline-block;height:.7rem;background:#0072b2}small{opacity:.75}</style>"""


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("sae", type=Path, help="folder of an SAE: saes/<run>/L<layer>, or .../H<head>")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--features", type=int, nargs="+", help="numbers of the features; none: those that write most")
    which.add_argument("--top", type=positive(int), default=50, help="how many of those")
    p.add_argument("--tokens", type=positive(int), default=65_536, help="harvested tokens to look at, cut to whole windows")
    p.add_argument("--activations_dir", type=Path, help="where harvest_activations.py wrote; none: where the SAE says")
    p.add_argument("--model_path", type=Path, help="checkpoint; none: where the SAE says")
    p.add_argument("--out", type=Path, default=Path("features.html"), help="the page; replaced if it is there")
    args = p.parse_args(argv)
    src = open_source(args.sae, args.activations_dir, args.model_path, args.tokens)
    latents = len(src.sae["W_dec"])
    for f in (f for f in args.features or [] if not 0 <= f < latents):
        raise HandoffError(f"--features {f}: {args.sae} has features 0 to {latents - 1}")
    rows = describe(src, args.features or strongest(src, args.top))
    about = (
        f"Layer {src.layer}, {latents:,} features; {src.idx.numel():,} harvested tokens in {len(src.idx):,} windows. "
        "A description: no null, no interval. Tokens are shaded by activation; point at one for its value."
    )
    with atomic(args.out) as tmp:
        tmp.write_text(render(f"Features of {args.sae}", about, rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} features, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
