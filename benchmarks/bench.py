"""Measure this project beside the libraries that people would otherwise use, on the machine at hand.

Every comparison is a race: the variants run in turn, A B B A A B ..., in one process, after warm-up calls, so that a
change of the machine's speed hits all of them. A row gives the median over the rounds, with the lowest and the highest. Peers
get what a user could give them: the same shapes, data and optimiser, autocast and torch.compile where they work.

Writes  <out>/results.json   rows {section, what, shape, variant, median, low, high, n, unit, better, ratio_to_best_peer}
        <out>/RESULTS.md     the same as tables; compare two runs with benchmarks/compare.py OLD.json NEW.json

Full    python benchmarks/bench.py               (make bench: under 25 minutes on two idle cores)
Quick   python benchmarks/bench.py --quick       (tiny shapes, into runs/bench: does every section run? The numbers mean nothing)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT, SKIPPED, Row, autocast, half, race, rates, row, skip
from peers import Text, ablation, harvest, janus_optimizer, janus_step, sae, sae_args, training

import janus_adaptive as janus


def machine(o: argparse.Namespace) -> list[Row]:
    """What the hardware gives: matrix products, memory, disk."""
    out = []
    for n in (256, 512) if o.quick else (2048, 3072, 4096):
        calls = {}
        for dtype in (torch.bfloat16, torch.float32):
            a, b, c = (torch.randn(n, n).to(dtype) for _ in range(3))
            calls[str(dtype)[6:]] = lambda a=a, b=b, c=c: torch.mm(a, b, out=c)
        for r in rates("machine", "matrix product", f"{n} x {n} x {n}", race(calls, o.seconds / 10), 2 * n**3 / 1e9, "GFLOP/s"):
            out.append(r | {"ratio_to_best_peer": math.nan})
    size = 1 << (20 if o.quick else 26)  # float32: 256 MB an array, far more than a cache
    a, b, c = (torch.ones(size) for _ in range(3))
    calls = {"copy (2 arrays)": lambda: a.copy_(b), "triad a = b + s c (3 arrays)": lambda: torch.add(b, c, alpha=0.5, out=a)}
    work = dict(zip(calls, (8 * size / 1e9, 12 * size / 1e9), strict=True))
    out += [r | {"ratio_to_best_peer": math.nan} for r in rates("machine", "memory", "", race(calls, o.seconds / 10), work, "GB/s")]
    block = os.urandom(1 << 24)

    def write() -> None:
        with tempfile.NamedTemporaryFile(dir=o.scratch) as f:
            for _ in range(1 if o.quick else 16):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())

    done = rates("machine", "disk", "", race({"write and fsync": write}, o.seconds / 10), len(block) * (1 if o.quick else 16) / 1e6, "MB/s")
    return out + done


def peak(command: list[str], folder: Path) -> tuple[float, float]:
    """Runs a script -> GB of its peak resident memory, and of the anonymous part of it (without mapped files)."""
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        resident, anonymous, done = 0, 0, 0
        while not done:
            with contextlib.suppress(OSError, KeyError):
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
                kb = {line.partition(":")[0]: int(line.split()[1]) for line in status if line.startswith(("VmHWM", "RssAnon"))}
                resident, anonymous = kb["VmHWM"], max(anonymous, kb["RssAnon"])  # ru_maxrss would count the parent before exec
            done, code = os.waitpid(process.pid, os.WNOHANG)
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode:
            last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise RuntimeError(f"{command[0]} ended with {process.returncode}: {' '.join(last).replace(f'{folder}/', '')}")
    return resident / 1e6 * 1.024, anonymous / 1e6 * 1.024


def memory(o: argparse.Namespace) -> list[Row]:
    """Peak memory of each phase as a process of its own: a few steps at full size, and two lengths at demo size."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    out: list[Row] = []
    with tempfile.TemporaryDirectory(dir=o.scratch) as name:
        folder = Path(name)

        def measure(what: str, shape: str, *command: object) -> None:
            try:
                resident, anonymous = peak([str(c) for c in (*command, "--cache_dir", folder / "cache")], folder)
            except RuntimeError as e:
                return skip(f"memory of {what}", e)
            out.append(row("memory", what, shape, "ours, resident", [resident], "GB", "lower"))
            out.append(row("memory", what, shape, "ours, anonymous (no mapped files)", [anonymous], "GB", "lower"))

        def model(preset: str, vocab: int, words: int, *more: object) -> tuple[Path, list[object]]:
            """A checkpoint after a step or two on `words` random words of a vocabulary of that size."""
            tokenizer, text = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, "w0")), folder / f"{preset}.txt"
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            tokenizer.save(str(folder / f"{preset}.json"))
            ids = np.random.default_rng(0).integers(vocab, size=(words // 50, 50))
            text.write_text("\n".join(" ".join(f"w{i}" for i in line) for line in ids.tolist()), encoding="utf-8")
            data = ["--dataset", text, "--tokenizer", folder / f"{preset}.json", "--preset", preset, "--save_dir", folder / preset]
            measure("1 training", f"{preset} preset, {' '.join(str(m) for m in more)}", "janus_adaptive.py", *data, *more)
            return folder / preset / "janus_adaptive_final.pt", ["--activations_dir", folder / "dumps", "--save_dir", folder / "saes"]

        preset, tokens, words = ("smoke", 20_000, 60_000) if o.quick else ("full", 20_000, 330_000)
        if o.whole and not o.quick:  # a full pool of train_sae.py; hero analysis takes 64 + 64 windows of 512 tokens
            tokens = 275_000
        layer = 3 if o.whole else 9  # what follows a late layer is soon run through
        two = ["--steps", 2, "--grad_accum", 2, "--compile", "off"]  # so that gradients and Adam's moments are there already
        big, saes = model(preset, 500 if o.quick else 50257, words, *two)
        dump = ["harvest_activations.py", "--model_path", big, "--save_dir", folder / "dumps", "--layers", 3, 6, 9]
        measure("2 harvest", f"{preset} preset, layers 3 6 9", *dump, "--tokens", tokens, "--run_name", "adaptive")
        few = ["--steps", 8, "--eval_tokens", 5_000, *(["--batch_size", 512] if o.quick else [])]
        train = ["train_sae.py", "--runs", "adaptive", "--layers", layer, *saes, *few]
        measure("3 SAE training", f"{preset} preset, one layer", *train)
        if o.whole and half():
            measure("3 SAE training", f"{preset} preset, one layer, --int8", *train, "--int8", "--overwrite")
        csv = folder / "ablation.csv"
        some = ["--n_seqs", 8, "--block", 1, "--n_mean", 4, "--resample_draws", 1, "--mode", "mean", "--bootstrap", 200]
        some += ["--dtype", "float32"]  # needs more memory than bfloat16, and auto would try both
        args = ["ablation_test.py", "--adaptive_model", big, "--save_file", csv, *some, *([] if o.whole else ["--layers", layer])]
        measure("4 ablation", f"{preset} preset, {'every layer' if o.whole else f'layer {layer}'}, 8 sequences", *args)
        args = ["--ablation_csv", csv, *saes[:2], "--saes_dir", folder / "saes", "--save_dir", folder / "hero", "--n_features", 2]
        args += ["--features", 2, "--force_layer", layer, "--force_head", 0, *([] if o.whole else ["--n_seqs", 2])]
        measure("5 hero analysis", f"{preset} preset, {'its own' if o.whole else '2 + 2'} sequences", "hero_head_analysis.py", *args)
        if o.whole:
            return out
        small, _ = model("demo", 500 if o.quick else 4096, 60_000 if o.quick else 650_000, "--steps", 1)
        for i, count in enumerate((20_000, 40_000) if o.quick else (275_000, 550_000)):  # one and two full pools of train_sae.py
            dump = ["harvest_activations.py", "--model_path", small, "--save_dir", folder / "dumps", "--layers", 3, "--tokens", count]
            measure("2 harvest: constant?", f"demo preset, {count:,} tokens", *dump, "--run_name", f"n{i}", "--overwrite")
            args = ["train_sae.py", "--runs", f"n{i}", "--layers", 3, *saes, "--steps", 8, "--eval_tokens", 5_000]
            measure("3 SAE training: constant?", f"demo preset, {count:,} tokens", *args)
    return out


def nulls(o: argparse.Namespace) -> list[Row]:
    """Sequence-permutation nulls of Energy-Lens beside scipy.stats.permutation_test, which takes one feature at a time."""
    from scipy import stats

    import energy_lens_minimal as lens

    s, length, k, n_perm = (40, 8, 64, 200) if o.quick else (313, 32, 2048, 10_000)
    g = torch.Generator().manual_seed(0)
    f, a = (torch.rand(s, length, k, generator=g) < 0.01) * torch.rand(s, length, k, generator=g), torch.randn(s, length, k, generator=g)
    strata, f0, a0 = torch.zeros(s), f[..., 0].numpy(), a[..., 0].numpy()
    perms = lens.permutations(strata, n_perm, np.random.default_rng(0))

    def statistic(order: np.ndarray, axis: int = -1) -> np.ndarray:
        return (f0 * a0[order.astype(int)]).sum((axis - 1, axis))

    def scipy() -> None:
        options = dict(permutation_type="pairings", n_resamples=n_perm, vectorized=True, batch=500, rng=np.random.default_rng(1))
        stats.permutation_test((np.arange(s),), statistic, **options)

    calls = {"ours": lambda: (lens.seqperm_moments(f, a, strata), lens.seqperm_mc(f, a, perms)), "scipy.stats.permutation_test": scipy}
    shape = f"{s * length:,} tokens, {n_perm:,} permutations"
    return rates(
        "nulls", "sequence permutations", shape, race(calls, o.seconds / 4), {"ours": k, "scipy.stats.permutation_test": 1}, "features/s"
    )


def gradients(o: argparse.Namespace) -> list[Row]:
    """States and energy gradients of three blocks of a pretrained model, beside what transformers alone would take for them."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    import real_model_extension as real

    width, vocab, n, length = (32, 500, 4, 16) if o.quick else (384, 16384, 8, 128)
    logging.set_verbosity_error()
    sizes = dict(vocab_size=vocab, n_positions=length, n_embd=width, n_layer=12, n_head=4, bos_token_id=0, eos_token_id=0)
    net, plain_net = (GPT2LMHeadModel(GPT2Config(**sizes)).eval() for _ in range(2))
    body, layers = net.transformer, [3, 7, 10]
    lm = real.LanguageModel("gpt2", net, body.h, body.ln_f, net.lm_head, list, str, length)
    ids = torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(0))

    def plain() -> None:
        plain_net(input_ids=ids, labels=ids).loss.backward()
        plain_net.zero_grad(set_to_none=True)

    def each(l: int) -> None:
        h = lm.run(ids, keep=(l,))[1][l]
        real.LossEnergy(lm, l, "final").grad(h, ids)

    calls = {
        "ours, three blocks at once": lambda: real.states_and_gradients(lm, ids, layers),
        "ours, a block at a time": lambda: [each(l) for l in layers],
        "transformers, one forward and backward, with weight gradients": plain,
    }
    shape = f"12x{width}, V={vocab:,}, {n} x {length} tokens"
    return rates("gradients", "states and gradients of three blocks", shape, race(calls, o.seconds / 2), ids.numel(), "tokens/s")


def scaling(o: argparse.Namespace) -> list[Row]:
    """One size changed at a time: training (not compiled), SAE training, and ablation of every head."""
    import ablation_test as at
    import train_sae as ts

    out, threads = list[Row](), torch.get_num_threads()

    def train(n_layers: int = 6, batch: int = 8) -> tuple[float, Callable[[], Any]]:
        sizes = dict(n_layers=n_layers, d_model=32 if o.quick else 256, n_heads=8, d_ff=64 if o.quick else 688, seq_len=128)
        flags = [str(w) for k, v in (sizes | dict(batch_size=batch, grad_accum=1)).items() for w in (f"--{k}", v)]
        args = janus.parse_args(flags)
        _, context = janus.set_up(args)
        torch.set_num_threads(threads)
        model = janus.NewGPT(janus.GPTConfig(vocab_size=4096, n_kv_heads=8, d_head=sizes["d_model"] // 8, **sizes)).train()
        optimizer, pressure = janus_optimizer(model, args), janus.Pressure(args)
        x, y = torch.randint(4096, (2, batch, 128))
        return batch * 128, lambda: janus_step(model, optimizer, pressure, args, context, 1, x, y, measure=True)

    def encoder(latents: int = 6144, n: int = 2048) -> tuple[float, Callable[[], Any]]:
        d = 64 if o.quick else 768
        x = torch.randn(n, d)
        settings = sae_args("topk", 32, latents // d, n, 10**9, 3e-4, "bfloat16" if half() else "float32", 10**7)
        t = ts.Trainer(settings, x.mean(0), float(x.norm(dim=1).mean()), torch.device("cpu"))
        return n, lambda: t.step(x)

    def heads(n_heads: int = 8) -> tuple[float, Callable[[], Any]]:
        n, n_layers, d = 4, 6, 32 if o.quick else 256
        sizes = dict(vocab_size=4096, n_layers=n_layers, d_model=d, d_ff=2 * d, seq_len=128)
        cfg = at.GPTConfig(n_heads=n_heads, n_kv_heads=n_heads, d_head=d // n_heads, **sizes)
        model, text = at.NewGPT(cfg).eval().requires_grad_(False), Text(torch.randint(4096, (n, 129)))
        zeros = {l: torch.zeros(n_heads, cfg.d_head) for l in range(n_layers)}
        args = argparse.Namespace(seed=0, batch_size=n, resample_draws=0)
        return n_layers * n_heads * n * 128, lambda: at.measure(
            model, text, zeros, args, np.arange(n), ["zero"], list(zeros), autocast(False)
        )

    families: list[tuple[str, str, Callable[..., tuple[float, Callable[[], Any]]], str, list[int]]] = [
        ("training step", "tokens/s", train, "n_layers", [3, 6, 12]),
        ("training step", "tokens/s", train, "batch", [2, 8, 32]),
        ("SAE training step", "tokens/s", encoder, "latents", [1536, 6144, 24576]),
        ("SAE training step", "tokens/s", encoder, "n", [512, 2048, 8192]),
        ("ablation of every head", "head-tokens/s", heads, "n_heads", [4, 8, 16]),
    ]
    for what, unit, make, name, sizes in families:
        made = {f"ours, {name} = {size:,}": make(**{name: size}) for size in sizes}
        times = race({k: call for k, (_, call) in made.items()}, o.seconds / 10)
        out += rates("scaling", what, f"{name} changed", times, {k: work for k, (work, _) in made.items()}, unit)
    for what, unit, make in {what: (what, unit, make) for what, unit, make, *_ in families}.values():
        work, call = make()

        def on(count: int, call: Callable[[], Any] = call) -> None:
            torch.set_num_threads(count)
            call()

        calls = {f"ours, {count} threads": lambda count=count, on=on: on(count) for count in sorted({1, threads})}
        out += rates("scaling", what, "threads changed", race(calls, o.seconds / 10), work, unit)
        torch.set_num_threads(threads)
    return out


# -------------------------------------------------------------------------------------------------------------- report
SECTIONS = {f.__name__: f for f in (machine, training, sae, ablation, harvest, nulls, gradients, memory, scaling)}


def describe() -> dict[str, Any]:
    """The machine and the versions behind the numbers."""
    cpu = (
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if platform.system() == "Linux"
        else []
    )
    flags = [k for k, v in torch.cpu.get_capabilities().items() if v is True and k in ("avx2", "avx512_bf16", "amx_bf16")]
    facts = {"cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(), "features": flags, "cores": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "compiler": shutil.which("c++"), "load_at_start": os.getloadavg()[0]}
    for name in ("transformers", "sae-lens", "transformer-lens", "dictionary-learning", "eai-sparsify"):
        with contextlib.suppress(ImportError):
            facts[name] = importlib.metadata.version(name)
    return facts | {k: v for k, v in janus.provenance().items() if k in ("git", "versions", "time")}


def markdown(results: dict[str, Any]) -> str:
    """The results as tables, one a section."""
    m, minutes = results["machine"], results["seconds"] / 60
    peers = ", ".join(f"{k} {v}" for k, v in m.items() if "-" in k or k == "transformers")
    commit = m["git"]["commit"][:8] + (" with changes" if m["git"]["dirty"] else "")
    text = f"""# Benchmarks

{m["cpu"]}, {m["cores"]} cores, {m["threads"]} threads, {", ".join(m["features"])}, C++ compiler {m["compiler"]}; torch
{m["versions"]["torch"]}, {peers}. {m["time"]}, commit {commit}, load average at the start
{m["load_at_start"]:.2f}, {minutes:.0f} minutes: `{results["command"]}`

Variants of a table ran in turn, A B B A A B ..., in one process: median [lowest, highest] over n rounds. "x peer" is how many times
better than the best variant that is not ours. Tokens are random and models untrained where speed is measured; what is learnt
(FVU, differences in standard errors) is measured on real activations and text.
"""
    number: Callable[[float], str] = lambda v: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}"  # noqa: E731
    for section in {r["section"]: 0 for r in results["rows"]}:
        text += f"\n## {section}\n\n{(SECTIONS[section].__doc__ or '').strip()} {results['section_seconds'][section] / 60:.1f} minutes.\n\n"
        text += "| what | shape | variant | median [low, high] | n | x peer |\n|---|---|---|---|---|---|\n"
        for r in (r for r in results["rows"] if r["section"] == section):
            spread = f" [{number(r['low'])}, {number(r['high'])}]" if r["n"] > 1 else ""
            ratio = f"{r['ratio_to_best_peer']:.2f}" if math.isfinite(r["ratio_to_best_peer"]) else ""
            text += f"| {r['what']} | {r['shape']} | {r['variant']} | {number(r['median'])}{spread} {r['unit']} | {r['n']} | {ratio} |\n"
    return text + ("\n## Not measured\n\n" + "".join(f"* {s}\n" for s in results["skipped"]) if results["skipped"] else "")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="what to measure",
    )
    p.add_argument("--quick", action="store_true", help="tiny shapes: only shows that every section runs")
    p.add_argument("--whole", action="store_true", help="memory: every layer, and all sequences of hero analysis; over an hour")
    p.add_argument("--seconds", type=float, default=2.0, help="time each variant of a race gets, seconds; at least three rounds")
    p.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`: its model and activations")
    p.add_argument("--activations", type=Path, metavar="FILE.npy", help="real activations [N, D] for SAE quality; none: those of --run")
    p.add_argument("--out", type=Path, help="folder of the results; none: benchmarks, with --quick runs/bench")
    o = p.parse_args(argv)
    if not 0 < o.seconds < 3600:
        p.error(f"--seconds is {o.seconds}, expected a positive number below 3600")
    start, o.seconds, o.scratch = time.perf_counter(), 0.0 if o.quick else o.seconds, ROOT / "runs"
    o.out = (o.out or ROOT / ("runs/bench" if o.quick else "benchmarks")).resolve()
    for folder in (o.out, o.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    SKIPPED.clear()
    janus.keep_memory()  # as the scripts do; the peers gain from it too
    words = ["python", "benchmarks/bench.py", *(sys.argv[1:] if argv is None else argv)]
    results: dict[str, Any] = {"command": " ".join(words), "machine": describe(), "rows": [], "skipped": SKIPPED, "section_seconds": {}}
    for name in o.sections:
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        try:
            found = SECTIONS[name](o)
        except Exception as e:  # the other sections are still worth having
            traceback.print_exc()
            skip(name, f"failed with {type(e).__name__}: {e}")
            continue
        for r in found:
            spread = f"{r['median']:.4g} [{r['low']:.4g}, {r['high']:.4g}] {r['unit']}"
            print(f"  {r['what']} | {r['shape']} | {r['variant']}: {spread}", flush=True)
        results["rows"] += found
        results["section_seconds"][name] = time.perf_counter() - began
        results["seconds"] = time.perf_counter() - start
        janus.write_json(o.out / "results.json", results)
        with janus.atomic(o.out / "RESULTS.md") as tmp:
            tmp.write_text(markdown(results), encoding="utf-8")
    print(f"{o.out / 'RESULTS.md'}: {time.perf_counter() - start:.0f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    return int(any("failed with" in s for s in SKIPPED))


if __name__ == "__main__":
    sys.exit(main())
