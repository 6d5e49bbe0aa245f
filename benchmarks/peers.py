"""Training, SAEs, ablation and harvest: the functions that the scripts run, in a race with the libraries that do the same."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from harness import Row, autocast, half, peer, race, rates, row, skip
from torch import Tensor, nn

import janus_adaptive as janus


# ----------------------------------------------------------------------------------------------------------- training
def janus_optimizer(model: janus.NewGPT, args: argparse.Namespace) -> torch.optim.Optimizer:
    """As main() of janus_adaptive.py builds it (tests/test_benchmarks.py compares the weights that come out)."""
    split = {True: args.weight_decay, False: 0.0}
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == m], "weight_decay": decay} for m, decay in split.items()]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def janus_step(model: janus.NewGPT, optimizer: Any, pressure: janus.Pressure, args: argparse.Namespace, context: Any, step: int,
               x: Tensor, y: Tensor, measure: bool) -> float:  # fmt: skip
    """One step as train_model() of janus_adaptive.py takes it -> loss; `measure`: the Homeostat sees sigma of this step."""
    for group in optimizer.param_groups:
        group["lr"] = janus.learning_rate(step, args)
    weights = torch.tensor(pressure.weights(step)) * torch.ones(args.n_layers)
    batches = list(zip(x.split(args.batch_size), y.split(args.batch_size), strict=True))
    loss, grams = janus.training_step(model, batches, weights, args, context, measure)
    nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if measure:
        pressure.observe(step, janus.sigma_of(grams).tolist(), janus.learning_rate(step, args) / args.learning_rate)
    return loss


def llama(cfg: janus.GPTConfig) -> nn.Module:
    """transformers' model of the same sizes; that it computes the same is what tests/test_model.py checks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layers)
    sizes |= dict(num_attention_heads=cfg.n_heads, max_position_embeddings=cfg.seq_len, rms_norm_eps=cfg.norm_eps)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, attn_implementation="sdpa")).train()


def gemm_bound(model: nn.Module, n: int) -> Callable[[], None]:
    """All matrix products of one step on n tokens, and nothing else: forward, input and weight gradient of every linear layer."""
    dtype, products = torch.bfloat16 if half() else torch.float32, []
    for shape, count in Counter(m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)).items():
        w, x, dy = (torch.randn(s).to(dtype) for s in (shape, (n, shape[1]), (n, shape[0])))
        for a, b in ((x, w.T), (dy, w), (dy.T, x)):
            products.append((count, a, b, torch.empty(len(a), b.shape[1], dtype=dtype)))

    def run() -> None:
        for count, a, b, c in products:
            for _ in range(count):
                torch.mm(a, b, out=c)

    return run


PARTS = {  # kind: what the name of a kernel contains; the first that fits
    "attention (where compiled: its products)": ("attention", "bmm"),
    "matrix products": ("mm", "linear", "gemm", "matmul"),
    "optimiser": ("adam",),
    "loss": ("softmax", "nll", "cross_entropy"),
}
SAE_PARTS = {
    "matrix product (the encoder's)": ("mm",),
    "embedding bags (decoder, sparse gradients, exact products)": ("embedding_bag",),
    "casts and copies": ("copy", "cat"),
    "selection of the largest": ("topk", "sort", "nonzero", "amax", "gather", "::index", "kthvalue", "bincount"),
    "optimiser": ("adam",),
}


def breakdown(call: Callable[[], Any], parts: dict[str, tuple[str, ...]] = PARTS) -> dict[str, float]:
    """Share of the CPU time of one call, by kind of kernel. What torch.compile fused counts as elementwise."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    total: Counter = Counter()
    for event in profile.key_averages():
        kind = next((k for k, words in parts.items() if any(w in event.key.lower() for w in words)), "elementwise, norms, copies, rest")
        total[kind] += event.self_cpu_time_total
    return {kind: t / sum(total.values()) for kind, t in total.items()}


def training(o: argparse.Namespace) -> list[Row]:
    """A training step, ours (both arms) and transformers' Llama in a plain loop."""
    out, backend = list[Row](), "aot_eager" if o.quick else "inductor"  # compiling takes minutes
    shapes = [(12, 768, 12, 2048, 50257, 512, 4), (8, 256, 8, 688, 8192, 256, 16)]
    for n_layers, d_model, n_heads, d_ff, vocab, seq_len, batch in [(2, 64, 4, 128, 512, 32, 4)] if o.quick else shapes:
        n, shape = batch * seq_len, f"{n_layers}x{d_model}, V={vocab:,}, T={seq_len}, {batch * seq_len:,} tokens a step"
        sizes = dict(n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_ff=d_ff, seq_len=seq_len)
        flags = [str(w) for k, v in (sizes | dict(batch_size=batch, grad_accum=1)).items() for w in (f"--{k}", v)]
        args = janus.parse_args(flags)
        _, context = janus.set_up(args)
        cfg = janus.GPTConfig(vocab_size=vocab, n_kv_heads=n_heads, d_head=d_model // n_heads, **sizes)
        model, theirs = janus.NewGPT(cfg).train(), llama(cfg)
        assert sum(p.numel() for p in theirs.parameters()) == model.n_params()[0]
        if shutil.which("c++"):
            for part in (*model.blocks, model.loss):  # as announce() does
                part.compile(backend=backend)
        mine, plain, steps = janus_optimizer(model, args), janus_optimizer(theirs, args), itertools.count(1)
        data = itertools.cycle([tuple(torch.randint(vocab, (batch, seq_len)) for _ in "xy") for _ in range(4)])
        arms = {arm: janus.Pressure(janus.parse_args([*flags, "--pressure", arm])) for arm in ("control", "adaptive")}

        def ours(arm: str, model=model, mine=mine, arms=arms, args=args, context=context, steps=steps, data=data) -> float:
            return janus_step(model, mine, arms[arm], args, context, next(steps), *next(data), measure=arm == "adaptive")

        def loop(net: Any, low: bool, theirs=theirs, plain=plain, data=data) -> None:
            x, y = next(data)
            with autocast(low):
                loss = net(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss
            loss.backward()
            loss.item()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            plain.step()
            plain.zero_grad(set_to_none=True)

        calls = {f"ours, {arm}": lambda ours=ours, arm=arm: ours(arm) for arm in arms}
        calls |= {"transformers, float32": lambda loop=loop, theirs=theirs: loop(theirs, False)}
        calls |= {"transformers, bfloat16 autocast": lambda loop=loop, theirs=theirs: loop(theirs, True)}
        if shutil.which("c++"):
            fast = torch.compile(theirs, backend=backend)
            calls |= {"transformers, bfloat16 autocast, torch.compile": lambda loop=loop, fast=fast: loop(fast, True)}
        else:
            skip("transformers, torch.compile", "no C++ compiler; apt-get install g++")
        calls["bound: matrix products only, bfloat16" if half() else "bound: matrix products only, float32"] = gemm_bound(model, n)
        times = race(calls, o.seconds)
        out += rates("training", "step", shape, times, n, "tokens/s")
        control, adaptive, bound = (np.array(v) for k, v in times.items() if k.startswith(("ours", "bound")))
        what, more = "Homeostat, sigma and penalty in every step", 100 * (adaptive / control - 1)
        out += [row("training", what, shape, "ours, adaptive against control", more, "% more time", "lower")]
        out += [row("training", "share of the matrix-product bound", shape, "ours, control", bound / control, "share", "higher")]
        for kind, share in breakdown(lambda ours=ours: ours("control")).items():
            out.append(row("training", f"profile: {kind}", shape, "ours, control", [share], "share"))
        torch.compiler.reset()
    return out


# --------------------------------------------------------------------------------------------------------------- SAEs
def sae_args(
    arch: str, k: int, expansion: int, batch: int, steps: int, lr: float, dtype: str, dead: int, seed: int = 0
) -> argparse.Namespace:
    """The settings of one train_sae.Trainer."""
    sizes = dict(arch=arch, k=k, expansion=expansion, batch_size=batch, steps=steps, learning_rate=lr, dtype=dtype, dead_tokens=dead)
    return argparse.Namespace(**sizes, aux_k=-1, l1=1e-3, lr_warmup=min(50, steps // 4), lr_decay=0.2, seed=seed)


def lens_trainer(arch: str, k: int, d: int, m: int, batch: int, steps: int, lr: float, low: bool, data: Iterator[Tensor]) -> Any:
    """SAELens' own trainer and SAE, with its own normalisation of the inputs, and our learning-rate schedule."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK"}[arch] + "TrainingSAE"
    cfg = getattr(sae_lens, f"{name}Config")(k=k, d_in=d, d_sae=m, normalize_activations="expected_average_only_in")
    settings = dict(total_training_samples=steps * batch, train_batch_size_samples=batch, lr=lr, autocast=low, lr_end=0.0)
    settings |= dict(lr_warm_up_steps=min(50, steps // 4), lr_decay_steps=steps // 5, n_batches_for_norm_estimate=10)
    return SAETrainer(SAETrainerConfig(**settings), getattr(sae_lens, name)(cfg), data)


def lens_step(trainer: Any, x: Tensor) -> None:
    trainer.step(x)
    trainer.n_training_steps += 1


def sparsify_step(module: Any, d: int, m: int, k: int) -> Callable[[Tensor], None]:
    """The body of sparsify's Trainer.fit, which only takes a whole language model, around its SparseCoder; Adam, fused."""
    sae = module.SparseCoder(d, module.SparseCoderConfig(num_latents=m, k=k))
    adam, idle = torch.optim.Adam(sae.parameters(), lr=3e-4, fused=True), torch.zeros(m, dtype=torch.int64)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        found = sae(x, dead_mask=idle > 10_000_000)
        (found.fvu + found.auxk_loss / 32).backward()
        idle.add_(len(x)).index_fill_(0, found.latent_indices.flatten(), 0)
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


LOW = ["int8", "bfloat16"]  # --int8, and the default where bfloat16 is fast


def sae(o: argparse.Namespace) -> list[Row]:
    """An SAE training step beside three libraries; then what comes out, on the same real activations, at equal L0."""
    import train_sae as ts

    d, expansion, k, n = (64, 8, 8, 256) if o.quick else (768, 16, 32, 4096)
    m, g = d * expansion, torch.Generator().manual_seed(0)
    size = f"d={d}, m={m:,}, k={k}"
    shape = f"{size}, {n:,} tokens a step"
    atoms, cpu = F.normalize(torch.randn(m, d, generator=g), dim=1), torch.device("cpu")
    data = [torch.randn(n, k, generator=g).abs()[:, None].bmm(atoms[torch.randint(m, (n, k), generator=g)])[:, 0] for _ in range(4)]
    x, norm = itertools.cycle(data), float(data[0].norm(dim=1).mean())

    def ours(arch: str, dtype: str) -> Any:
        return ts.Trainer(sae_args(arch, k, expansion, n, 10**9, 3e-4, dtype, 10_000_000), data[0].mean(0), norm, cpu)

    dtypes = [*LOW, "float32"] if half() else ["float32"]
    kinds = [("topk", t) for t in dtypes] + [("batchtopk", dtypes[half()])]
    mine = {f"ours, {arch}, {dtype}": ours(arch, dtype) for arch, dtype in kinds}
    calls: dict[str, Callable[[], Any]] = {name: lambda t=t: t.step(next(x)) for name, t in mine.items()}
    lens = peer("sae_lens")
    for arch, low in (("topk", False), ("topk", True), ("batchtopk", True)) if lens else ():
        t = lens_trainer(arch, k, d, m, n, 10**6, 3e-4, low, x)
        calls[f"SAELens, {arch}, {'bfloat16 autocast' if low else 'float32'}"] = lambda t=t: lens_step(t, next(x))
    if dictionary := peer("dictionary_learning.trainers.top_k"):
        them = dictionary.TopKTrainer(steps=10**6, activation_dim=d, dict_size=m, k=k, layer=0, lm_name="", device="cpu")
        calls["dictionary_learning, topk, float32"] = lambda: them.update(1, next(x))
    if sparsify := peer("sparsify"):
        coder = sparsify_step(sparsify, d, m, k)
        calls["sparsify, topk, float32"] = lambda: coder(next(x))
    wide = [torch.randn(s).to(getattr(torch, dtypes[half()])) for s in ((n, d + 1), (d + 1, m))]  # the bias is one more input
    calls[f"bound: the encoder's matrix product only, {dtypes[half()]}"] = lambda: torch.mm(*wide)
    out = rates("sae", "training step", shape, race(calls, o.seconds), n, "tokens/s")
    first = next(iter(mine))
    for kind, share in breakdown(calls[first], SAE_PARTS).items():
        out.append(row("sae", f"profile: {kind}", shape, first, [share], "share"))

    for dtype in dtypes:  # gradients by hand against autograd on the dense loss, 512 tokens
        t = ours("topk", dtype)
        raw = ((data[0][:512] - t.mean) * t.scale).float()
        params = [p.clone().requires_grad_() for p in t.params]
        w_enc, b_enc, w_dec, b_dec = params
        pre = (raw - b_dec) @ w_enc.T + b_enc
        support = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k).indices, True)
        ((pre.relu() * support) @ w_dec + b_dec - raw).square().mean().backward()
        t.gradients(raw)
        errors = [((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in zip(t.params, params, strict=True)]
        what = "worst gradient against dense float32 autograd"
        out.append(row("sae", what, size, f"ours, topk, {dtype}", [max(errors)], "relative error", "lower"))
    return out + (sae_quality(o, ts) if lens else [])


def sae_quality(o: argparse.Namespace, ts: Any) -> list[Row]:
    """Held-out FVU at equal L0, and silent latents, after the same steps on the same real activations in the same order; a seed
    sets the initial weights of both and that order."""
    path = o.activations or o.run / "activations" / "control" / "L3.z.npy"
    if not path.is_file():
        skip("SAE quality", f"{path} is not there; make it with `make demo`, or pass --activations FILE.npy")
        return []
    acts, (expansion, k, n, steps) = np.load(path, mmap_mode="r"), (4, 4, 256, 8) if o.quick else (8, 16, 2048, 300)
    acts = acts[: 20 * n] if o.quick else acts
    cut, d = int(0.95 * len(acts)), acts.shape[1]
    held = torch.from_numpy(np.array(acts[cut : cut + 20_000])).float()
    train, mean = torch.from_numpy(np.array(acts[:cut])), held.mean(0)
    centre = train.float().mean(0)
    norm, m = (train[::97].float() - centre).norm(dim=1).mean().item(), expansion * d
    shape = f"{path.stem} ({d} dimensions), m={m:,}, k={k}, {steps * n:,} tokens"

    def stream(seed: int) -> Iterator[Tensor]:
        g = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(train), generator=g).split(n):
                if len(rows) == n:
                    yield train[rows].float()

    @torch.no_grad()
    def score(w: dict[str, Tensor], arch: str) -> tuple[float, float]:
        """FVU with exactly k latents a token (topk) or on average (batchtopk), the same code for both; latents that never fire."""
        pre = ((held - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        least = pre.topk(k).values[:, -1:] if arch == "topk" else pre.flatten().topk(k * len(pre)).values[-1]
        f = pre * (pre >= least)
        fvu = (f @ w["W_dec"] + w["b_dec"] - held).square().sum() / (held - mean).square().sum()
        return fvu.item(), (f == 0).all(0).float().mean().item()

    out, lr, seeds = list[Row](), 1e-2, range(2 if o.quick else 4)  # of 3e-3, 1e-2 and 2e-2 about the best for both
    low = "bfloat16" if half() else "float32"
    for arch, dtypes in (("topk", LOW if half() else [low]), ("batchtopk", [low])):
        scores: dict[str, list[tuple[float, float]]] = {}
        for dtype, seed in itertools.product(dtypes, seeds):
            settings = sae_args(arch, k, expansion, n, steps, lr, dtype, 10**5, seed)
            t = ts.Trainer(settings, centre, norm, torch.device("cpu"))
            for batch in itertools.islice(stream(seed), steps):
                t.step(batch)
            scores.setdefault(f"ours, {arch}, {dtype}", []).append(score(t.weights(t.scale, t.mean), arch))
        for seed in seeds:
            torch.manual_seed(seed)
            with contextlib.redirect_stderr(io.StringIO()):
                them = lens_trainer(arch, k, d, m, n, steps, lr, False, stream(seed)).fit()
            them.fold_W_dec_norm()
            scores.setdefault(f"SAELens, {arch}, float32", []).append(score(dict(them.state_dict()), arch))
        theirs = np.array(scores[f"SAELens, {arch}, float32"])[:, 0]
        for who, pairs in scores.items():
            fvu, silent = np.array(pairs).T
            better, what = theirs.mean() / fvu.mean(), f"held-out FVU, seeds, learning rate {lr:g}"
            out.append(row("sae", what, shape, who, fvu, "FVU", "lower", better))
            out.append(row("sae", "latents that never fire on 20,000 held-out tokens", shape, who, silent, "share"))
            if who.startswith("ours"):
                out.append(row("sae", "FVU against SAELens, same seed", shape, who, 100 * (fvu / theirs - 1), "% more", "lower"))
    return out


# ------------------------------------------------------------------------------------------------- ablation, harvest
class Text:
    """Tokens [n, T + 1] as the loader of the scripts hands them out."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.n_windows, self.seq_len = rows, len(rows), rows.shape[1] - 1

    def batch(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.rows[windows, :-1], self.rows[windows, 1:]


def hooked(model: Any) -> Any:
    """The same weights in TransformerLens; None if it is not installed."""
    if not (lens := peer("transformer_lens")):
        return None
    c, split = model.cfg, (model.cfg.n_heads, model.cfg.d_head)
    sizes = dict(n_layers=c.n_layers, d_model=c.d_model, n_heads=c.n_heads, d_head=c.d_head, d_mlp=c.d_ff, d_vocab=c.vocab_size)
    sizes |= dict(n_ctx=c.seq_len, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True, eps=c.norm_eps, device="cpu")
    net = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, positional_embedding_type="rotary", rotary_dim=c.d_head))
    state = {"embed.W_E": model.embedding.weight, "unembed.W_U": model.unembedding.weight.T, "ln_final.w": model.norm.weight}
    for l, b in enumerate(model.blocks):
        q, key, v = (w.unflatten(0, split).mT for w in b.attn.w_qkv.weight.chunk(3))
        gate, up = b.w_gate_up.weight.chunk(2)
        w = {
            "attn.W_Q": q,
            "attn.W_K": key,
            "attn.W_V": v,
            "attn.W_O": b.attn.w_o.weight.T.unflatten(0, split),
            "ln1.w": b.norm_attn.weight,
        }
        w |= {"mlp.W_gate": gate.T, "mlp.W_in": up.T, "mlp.W_out": b.w_down.weight.T, "ln2.w": b.norm_mlp.weight}
        state |= {f"blocks.{l}.{name}": t for name, t in w.items()}
    net.load_state_dict(state, strict=False)  # what is not named here are biases, which are zero
    return net.eval().requires_grad_(False)


def small_model(script: Any, o: argparse.Namespace) -> tuple[Any, str]:
    """An untrained model whose heads matter (weights three times as large as usual), and its shape."""
    n_layers, d_model, n_heads, vocab, seq_len = (2, 48, 3, 512, 32) if o.quick else (12, 384, 6, 16384, 256)
    sizes = dict(vocab_size=vocab, n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads, seq_len=seq_len)
    torch.manual_seed(0)
    model = script.NewGPT(script.GPTConfig(**sizes, d_head=d_model // n_heads, d_ff=d_model * 8 // 3)).eval().requires_grad_(False)
    for p in model.blocks.parameters():
        p.mul_(3.0 if p.dim() > 1 else 1.0)
    return model, f"{n_layers}x{d_model}, {n_heads} heads, V={vocab:,}, T={seq_len}"


def ablation(o: argparse.Namespace) -> list[Row]:
    """Zero ablation of every head, ours (with KL, flips and first-order effects) and TransformerLens (loss only)."""
    import ablation_test as at

    (model, shape), n = small_model(at, o), 2 if o.quick else 4
    cfg, rows = model.cfg, torch.randint(model.cfg.vocab_size, (n, model.cfg.seq_len + 1))
    random, layer = Text(rows), (cfg.n_layers - 1) // 3
    layers = [layer, cfg.n_layers - 1 - layer]  # their mean depth is that of all
    x, y = random.batch(np.arange(n))

    def ours(low: bool, model=model, text=random, size=n, layers=layers) -> dict[str, np.ndarray]:
        zeros = {l: torch.zeros(model.cfg.n_heads, model.cfg.d_head) for l in layers}
        args = argparse.Namespace(seed=0, batch_size=size, resample_draws=0)
        return at.measure(model, text, zeros, args, np.arange(text.n_windows), ["zero"], list(zeros), autocast(low))

    calls: dict[str, Callable[[], Any]] = {"ours, float32": lambda: ours(False)} | (
        {"ours, bfloat16": lambda: ours(True)} if half() else {}
    )
    heads = [(l, l % cfg.n_heads) for l in layers]  # every head costs TransformerLens the same
    work = dict.fromkeys(calls, len(layers) * cfg.n_heads * n * cfg.seq_len)
    if net := hooked(model):

        @torch.inference_mode()
        def theirs(low: bool) -> Tensor:
            losses = []
            for l, h in heads:
                hook = lambda z, hook, h=h: z.index_fill(2, torch.tensor([h]), 0.0)  # noqa: E731, ARG005
                with autocast(low):
                    logits = net.run_with_hooks(x, fwd_hooks=[(f"blocks.{l}.attn.hook_z", hook)])
                losses.append(F.cross_entropy(logits.float().mT, y, reduction="none").mean(1))
            return torch.stack(losses, 1)  # [n, heads]

        calls |= {"TransformerLens, float32": lambda: theirs(False)}
        calls |= {"TransformerLens, bfloat16 autocast": lambda: theirs(True)} if half() else {}
        work |= dict.fromkeys([c for c in calls if c not in work], len(heads) * n * cfg.seq_len)
    out = rates(
        "ablation",
        f"every head of layers {' '.join(map(str, layers))}, zero ablation",
        shape,
        race(calls, o.seconds),
        work,
        "head-tokens/s",
    )
    if net:
        worst = np.abs(ours(False)["zero.loss"][:, range(len(layers)), [h for _, h in heads]] - theirs(False).numpy()).max()
        out.append(
            row("ablation", "largest difference to TransformerLens in a sequence's loss", shape, "ours, float32", [worst], "nats", "lower")
        )
    dump = o.run / "activations" / "control" / "tokens.npy"
    if not dump.is_file() or not half():
        skip("ablation in bfloat16", f"needs fast bfloat16, and a trained model and its tokens: {dump} (make demo)")
        return out
    trained, _ = at.load_checkpoint(o.run / "control" / "janus_control_final.pt", torch.device("cpu"), False)
    size = trained.cfg.seq_len + 1
    text = Text(torch.from_numpy(np.load(dump, mmap_mode="r")[: size * (8 if o.quick else 48)].astype(np.int64)).view(-1, size))
    low, full = (
        m["zero.loss"] - m["base"][:, None, None]
        for m in (ours(b, trained.requires_grad_(False), text, 16, range(trained.cfg.n_layers)) for b in (True, False))
    )
    error = np.abs(low.mean(0) - full.mean(0)) / (full.std(0, ddof=1) / math.sqrt(len(full)))
    what = f"impact in bfloat16 minus float32, standard errors over {len(full)} sequences"
    return [
        *out,
        row("ablation", what, f"trained demo model, {error.size} heads", "ours, bfloat16", error.flatten(), "standard errors", "lower"),
    ]


def harvest(o: argparse.Namespace) -> list[Row]:
    """z of one layer to disk, beside a bare forward pass to the same depth and the caches of SAELens and TransformerLens."""
    import harvest_activations as ha

    (model, shape), n = small_model(ha, o), 16 if o.quick else 96
    rows, layer = torch.randint(model.cfg.vocab_size, (n, model.cfg.seq_len + 1)), model.cfg.n_layers // 2
    text, batches, low = Text(rows), list(np.arange(n).reshape(-1, 16)), half()
    d, hook, run_no = model.cfg.d_model, f"blocks.{layer}.attn.hook_z", itertools.count()

    @torch.inference_mode()
    def bare() -> None:
        for b in batches:
            with autocast(low):
                model.run_blocks(model.embed(text.batch(b)[0]), stop=layer + 1)

    def in_memory(layers: list[int]) -> None:
        for b in batches:
            for l, z in zip(layers, ha.layer_activations(model, text.batch(b)[0], layers, "z", autocast(low)).values(), strict=True):
                ha.sufficient_statistics(ha.to_dump(z, "float16", f"layer {l}"), z)

    with tempfile.TemporaryDirectory(dir=o.scratch) as folder, warnings.catch_warnings(action="ignore"):

        def to_disk(layers: list[int]) -> None:
            args = argparse.Namespace(out=Path(folder) / "ours", site="z", dump_dtype="float16", overwrite=True, batch_size=16, max_gb=64.0)
            with contextlib.redirect_stdout(io.StringIO()):
                ha.harvest(args, model, text, autocast(low), {"todo": layers}, np.linspace(0, n, 4).astype(int))

        several = [*range(0, layer, 2), layer]
        calls: dict[str, Callable[[], Any]] = {"bound: bare forward pass, nothing kept": bare}
        calls |= {"ours, statistics, nothing written": lambda: in_memory([layer]), "ours, npy float16": lambda: to_disk([layer])}
        calls[f"ours, npy float16, {len(several)} layers at once"] = lambda: to_disk(several)
        if net := hooked(model):

            @torch.inference_mode()
            def cached() -> None:
                z = []
                for b in batches:
                    with autocast(low):
                        cache = net.run_with_cache(text.batch(b)[0], names_filter=hook, stop_at_layer=layer + 1, return_type=None)[1]
                    z.append(cache[hook].flatten(2).half())
                with open(Path(folder) / "theirs.npy", "wb") as f:
                    np.save(f, torch.cat(z).flatten(0, 1).numpy())
                    os.fsync(f.fileno())

            calls["TransformerLens run_with_cache, npy float16"] = cached
        if (lens := peer("sae_lens.cache_activations_runner")) and net:
            from datasets import Dataset, disable_progress_bars

            disable_progress_bars()
            tokens = Dataset.from_dict({"input_ids": rows[:, :-1].tolist()})

            def runner(kind: str) -> None:
                path = Path(folder) / f"arrow{next(run_no)}"
                sizes = dict(model_batch_size=16, d_in=d, training_tokens=n * text.seq_len, context_size=text.seq_len, device="cpu")
                sizes |= dict(prepend_bos=False, shuffle=False, autocast_lm=low, dtype=kind, new_cached_activations_path=str(path))
                sizes["buffer_size_gb"] = (n * text.seq_len * d * np.dtype(kind).itemsize + 1) / 1e9  # it writes whole buffers only
                cfg = lens.CacheActivationsRunnerConfig(dataset_path="", model_name="", hook_name=hook, **sizes)
                # its own loader fetches models from the hub
                with mock.patch.object(lens, "load_model", lambda **_: net), contextlib.redirect_stderr(io.StringIO()):
                    lens.CacheActivationsRunner(cfg, tokens).run()
                shutil.rmtree(path)

            calls |= {f"SAELens CacheActivationsRunner, arrow {kind}": lambda kind=kind: runner(kind) for kind in ("float32", "float16")}
        return rates("harvest", f"z of layer {layer}", shape, race(calls, o.seconds), n * text.seq_len, "tokens/s")
