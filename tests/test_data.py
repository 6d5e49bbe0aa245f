"""The loader: splits, tokens, cache and windows, on every kind of local input; and what it says when there is no hub."""

import os
import subprocess
import sys
import threading

import datasets
import numpy as np
import pandas as pd
import pytest

import janus_adaptive as janus

LINES = [
    f"Sentence number {i} of the corpus speaks about things such as rain, iron and number {i * i}."
    for i in range(400)
]


@pytest.fixture(params=["txt", "parquet", "jsonl", "json", "folder"])
def corpus(request, tmp_path):
    """The same 400 texts in every format."""
    path, frame = tmp_path / f"corpus.{request.param}", pd.DataFrame({"text": LINES})
    if request.param == "txt":
        path.write_text("\n".join(LINES), encoding="utf-8")
    elif request.param == "parquet":
        frame.to_parquet(path)
    elif request.param == "folder":
        path = tmp_path / "saved"
        datasets.Dataset.from_pandas(frame).save_to_disk(path)
    else:
        frame.to_json(path, orient="records", lines=request.param == "jsonl")
    return path


def test_every_format_gives_the_same_three_splits(corpus):
    parts = [janus.read_documents(str(corpus), s) for s in ("train", "validation", "test")]
    assert parts[0] + parts[1] + parts[2] == LINES  # in order, nothing lost, nothing twice
    share = [sum(map(len, p)) / sum(map(len, LINES)) for p in parts]
    assert share == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


def test_a_dataset_dict_keeps_its_own_splits(tmp_path):
    parts = {
        s: datasets.Dataset.from_dict({"text": [s, "", " "]})
        for s in ("train", "validation", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert janus.read_documents(str(tmp_path / "saved"), "validation") == ["validation"]


def test_one_long_line_still_has_three_splits(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text(" ".join(LINES), encoding="utf-8")
    parts = [janus.read_documents(str(path), s) for s in ("train", "validation", "test")]
    assert all(parts)
    assert " ".join(" ".join(p) for p in parts) == " ".join(LINES)


def test_tokens_decode_to_the_text_and_the_cache_is_reused(corpus, tmp_path, monkeypatch):
    loader = janus.HFWikiTextLoader(str(corpus), "train:300", 16, "validation", tmp_path / "cache")
    text = "".join(t + "\n\n" for t in janus.read_documents(str(corpus), "validation"))
    assert loader.tokenizer.decode(loader.tokens.tolist()) == text
    assert loader.tokenizer.get_vocab_size() == 300 and loader.tokens.dtype == np.uint16
    monkeypatch.setattr(janus, "read_documents", lambda *_: pytest.fail("tokenised twice"))
    again = janus.HFWikiTextLoader(str(corpus), "train:300", 16, "validation", tmp_path / "cache")
    assert np.array_equal(again.tokens, loader.tokens)


def test_documents_begin_at_titles_or_after_2000_characters(tmp_path):
    titled = ["before the first title", " = Rain = ", "It rains.", " = = Causes = = ", "Clouds."]
    titled += [" = Iron = ", "A metal."]
    assert janus.first_texts(titled) == [0, 1, 5]
    lines = ["x" * 600] * 10 + ["y" * 5000, "z"]
    assert janus.first_texts(lines) == [0, 4, 8, 11]  # 4 x 600 are 2,400 characters

    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES))
    data = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    texts = janus.read_documents(str(path), "train")
    first = janus.first_texts(texts)
    assert len(data.document_starts) == len(first) > 10
    for number in (0, 1, len(first) - 1):
        begins = data.tokenizer.decode(data.tokens[data.document_starts[number] :][:40].tolist())
        assert begins.startswith(texts[first[number]][:20])

    # The number of a token's document is how many documents began at or before it, less one
    windows = np.array([0, 3, data.n_windows - 1])
    numbers = data.documents(windows)
    for row, window in enumerate(windows):
        for place in (0, 7, 15):
            began = (data.document_starts <= window * 16 + place).sum()
            assert numbers[row, place] == began - 1
    again = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    assert np.array_equal(again.document_starts, data.document_starts)


@pytest.mark.parametrize(("n", "expected"), [(0, 11), (5, 5), (11, 11), (99, 11)])
def test_spread_windows_are_distinct_and_cover_the_split(n, expected, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES))
    data = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    data.n_windows = 11
    windows = data.spread(n)
    assert len(set(windows)) == expected and windows.max() < 11
    assert windows[0] == 0 and windows[-1] >= 11 - np.ceil(11 / expected)


def test_changed_content_is_not_served_from_the_cache(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES))
    one = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    path.write_text("\n".join(reversed(LINES)))
    two = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    assert one.description["dataset_key"] != two.description["dataset_key"]
    assert not np.array_equal(one.tokens[:200], two.tokens[:200])


def test_windows_and_the_shuffled_stream(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES))
    loader = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    x, y = loader.batch(np.arange(loader.n_windows))
    flat = np.asarray(loader.tokens)
    assert np.array_equal(x.flatten(), flat[: x.numel()]) and np.array_equal(
        y.flatten(), flat[1 : x.numel() + 1]
    )
    epoch = loader.n_windows - 1
    whole = loader.shuffled(0, 2 * epoch + 5, seed=7)[0]
    pieces = [
        loader.shuffled(i, min(10, 2 * epoch + 5 - i), seed=7)[0]
        for i in range(0, 2 * epoch + 5, 10)
    ]
    assert np.array_equal(whole, np.concatenate(pieces))  # a cursor and a seed say it all
    visited = sorted(map(tuple, whole[:epoch].tolist()))
    shifted = (
        sorted(map(tuple, loader.batch(np.arange(epoch), offset)[0].tolist()))
        for offset in range(16)
    )
    assert any(visited == windows for windows in shifted)  # one epoch visits each window once
    assert not np.array_equal(whole[:epoch], whole[epoch : 2 * epoch])
    assert not np.array_equal(whole[:10], loader.shuffled(0, 10, seed=8)[0])


def test_builtin_is_prose_in_a_fixed_order_split_by_document(monkeypatch):
    monkeypatch.setattr(
        janus, "BUILTIN_PACKAGES", {"numpy": "numpy"}
    )  # two sources are enough, and quick
    docs = janus.builtin_documents.__wrapped__()  # not from its cache
    assert docs == janus.builtin_documents.__wrapped__()
    paragraphs = [p for text in docs.values() for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 5000
    assert sum(map(len, paragraphs)) > 1_500_000
    monkeypatch.setattr(janus, "builtin_documents", lambda: docs)
    parts = [janus.read_documents("builtin", s) for s in ("train", "validation", "test")]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(docs.values())
    assert len(parts[0]) > 10 * len(parts[1]) > 0


@pytest.mark.parametrize(
    "what", [["--dataset", "wikitext-103-raw-v1"], ["--dataset", "PATH", "--tokenizer", "gpt2"]]
)
def test_without_a_hub_one_line(what, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES))
    script = janus.__file__
    env = {
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }  # nobody listens there
    argv = [
        sys.executable,
        script,
        *[str(path) if w == "PATH" else w for w in what],
        "--preset",
        "smoke",
        "--save_dir",
        str(tmp_path / "out"),
    ]
    r = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert r.returncode == 1
    assert "--dataset builtin" in r.stderr and "--dataset PATH" in r.stderr
    assert r.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_silent_hub_is_waited_for_once_and_then_never_asked(monkeypatch):
    """The bound on the wait is checked by what is waited for: a busy machine takes longer."""
    waits = []

    class Silent(threading.Event):
        def wait(self, timeout=None):
            if timeout is None:  # a thread that starts waits for itself
                return super().wait()
            waits.append(timeout)
            return False

    def load():
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
        raise OSError("not in the cache")

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setattr(janus.threading, "Event", Silent)
    with pytest.raises(janus.HandoffError, match="no answer from http://127.0.0.1:9"):
        janus.from_hub("a dataset", load)
    assert waits == [6.0]
