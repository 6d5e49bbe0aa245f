"""Harvest: z of one layer to disk, by harvest_activations.py in a race with two libraries' caches.

Shapes: B windows, T tokens, N = B T tokens of all windows, H heads, K d_head.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import Calls, Row, autocast, bfloat16_is_fast, peer, race, rates
from race_ablation import Text, hooked, small_model


@dataclass
class HarvestTask:
    """What every variant of the harvest race does: z of `layer` of `text`, in batches of windows.

    ha: harvest_activations.py. folder: where to write. low: whether to multiply in bfloat16.
    """

    ha: Any
    model: Any
    text: Text
    layer: int
    batches: list[np.ndarray]
    folder: Path
    low: bool

    @property
    def hook(self) -> str:
        """TransformerLens' name of that z."""
        return f"blocks.{self.layer}.attn.hook_z"

    @torch.inference_mode()
    def forward_only(self) -> None:
        """What no harvest can do without: the blocks up to the layer."""
        for windows in self.batches:
            x, _ = self.text.batch(windows)
            with autocast(self.low):
                self.model.run_blocks(self.model.embed(x), stop=self.layer + 1)

    def in_memory(self) -> None:
        """As the script does it, with its statistics, but without a file."""
        ha, layer = self.ha, self.layer
        for windows in self.batches:
            x, _ = self.text.batch(windows)  # [B, T]
            tapped = ha.layer_activations(self.model, x, [layer], "z", autocast(self.low))
            z = tapped[f"z.{layer}"]  # [N, H K], float32
            dumped = ha.to_dump(z, "float16", f"layer {layer}")  # [N, H K], float16
            ha.sufficient_statistics(dumped, z)

    def to_disk(self, layers: list[int]) -> None:
        """The script's own loop over batches, which writes the dumps of `layers`."""
        # What harvest() reads of the script's arguments
        args = argparse.Namespace(
            out=self.folder / "ours",
            site="z",
            dump_dtype="float16",
            overwrite=True,
            batch_size=16,  # as the batches of the others
            max_gb=64.0,
        )
        # Windows [4] between which the statistics are kept apart, as bootstrap blocks
        checkpoints = np.linspace(0, self.text.n_windows, 4).astype(int)
        with contextlib.redirect_stdout(io.StringIO()):
            self.ha.harvest(
                args, self.model, self.text, autocast(self.low), {"todo": layers}, checkpoints
            )

    @torch.inference_mode()
    def run_with_cache(self, net: Any) -> None:
        """As the documentation of TransformerLens does it, with one file at the end."""
        parts = []
        for windows in self.batches:
            x, _ = self.text.batch(windows)
            with autocast(self.low):
                _, cache = net.run_with_cache(
                    x,
                    names_filter=self.hook,
                    stop_at_layer=self.layer + 1,
                    return_type=None,
                )
            parts.append(cache[self.hook].flatten(2).half())  # [B, T, H K], float16 as ours
        # On the disk, as the script's files are, not only in the cache of the system
        with open(self.folder / "theirs.npy", "wb") as f:
            np.save(f, torch.cat(parts).flatten(0, 1).numpy())  # [N, H K]
            os.fsync(f.fileno())


def lens_runner(lens: Any, task: HarvestTask, net: Any) -> Callable[[str], None]:
    """SAELens' CacheActivationsRunner around TransformerLens' `net`; it is called with a dtype."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    text, d = task.text, task.model.cfg.d_model
    # It reads a dataset of token ids, as many a row as its context has
    tokens = Dataset.from_dict({"input_ids": text.rows[:, :-1].tolist()})
    number = itertools.count()  # of its folders

    def run(dtype: str) -> None:
        path = task.folder / f"arrow{next(number)}"
        n_bytes = text.n_tokens * d * np.dtype(dtype).itemsize
        config = lens.CacheActivationsRunnerConfig(
            dataset_path="",
            model_name="",
            hook_name=task.hook,
            model_batch_size=16,
            d_in=d,
            training_tokens=text.n_tokens,
            context_size=text.seq_len,
            device="cpu",
            prepend_bos=False,  # the same tokens, in the same order, as the others
            shuffle=False,
            autocast_lm=task.low,
            dtype=dtype,
            new_cached_activations_path=str(path),
            buffer_size_gb=(n_bytes + 1) / 1e9,  # it writes whole buffers only
        )
        # Its own loader fetches models from the hub
        its_model = mock.patch.object(lens, "load_model", lambda **_: net)
        with its_model, contextlib.redirect_stderr(io.StringIO()):
            lens.CacheActivationsRunner(config, tokens).run()
        shutil.rmtree(path)  # it refuses a folder that is there

    return run


def harvest_calls(task: HarvestTask) -> Calls:
    """One harvest by every variant."""
    layer = task.layer
    # A forward pass to the deepest layer passes the others anyway
    several = [*range(0, layer, 2), layer]
    calls: Calls = {
        "bound: bare forward pass, nothing kept": task.forward_only,
        "ours, statistics, nothing written": task.in_memory,
        "ours, npy float16": lambda: task.to_disk([layer]),
        f"ours, npy float16, {len(several)} layers at once": lambda: task.to_disk(several),
    }
    # One model for both libraries
    net = hooked(task.model)
    if net:
        name = "TransformerLens run_with_cache, npy float16"
        calls[name] = lambda: task.run_with_cache(net)
    # It harvests through a model of TransformerLens
    lens = peer("sae_lens.cache_activations_runner")
    if lens and net:
        runner = lens_runner(lens, task, net)
        calls["SAELens CacheActivationsRunner, arrow float32"] = lambda: runner("float32")
        calls["SAELens CacheActivationsRunner, arrow float16"] = lambda: runner("float16")
    return calls


def harvest(options: argparse.Namespace) -> list[Row]:
    """z of one layer to disk, beside a bare forward pass to the same depth and the caches of
    SAELens and TransformerLens."""
    import harvest_activations as ha

    model, shape = small_model(ha, options.quick)
    n = 16 if options.quick else 96
    text = Text(torch.randint(model.cfg.vocab_size, (n, model.cfg.seq_len + 1)))
    batches = list(np.arange(n).reshape(-1, 16))  # numbers of windows
    # Half-way: what lies deeper need not be run
    layer = model.cfg.n_layers // 2
    scratch = tempfile.TemporaryDirectory(dir=options.scratch)
    with scratch as folder, warnings.catch_warnings(action="ignore"):
        low = bfloat16_is_fast()
        task = HarvestTask(ha, model, text, layer, batches, Path(folder), low)
        times = race(harvest_calls(task), options.seconds)
    return rates("harvest", f"z of layer {layer}", shape, times, text.n_tokens, "tokens/s")
