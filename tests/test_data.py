"""The loader: splits, tokens, cache and windows, on every kind of local input; and what it says when there is no hub."""

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

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


def read_saved(folder: Path, split: str) -> list[str]:
    return janus.read_documents(str(folder), split)


@pytest.mark.parametrize("others", [[], ["test"]])
def test_a_folder_without_validation_does_not_validate_on_what_it_trains_on(others, tmp_path):
    parts = {"train": datasets.Dataset.from_dict({"text": LINES})}
    parts |= {name: datasets.Dataset.from_dict({"text": [name]}) for name in others}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "s")
    train = read_saved(tmp_path / "s", "train")
    validation = read_saved(tmp_path / "s", "validation")
    assert train and validation and train + validation == LINES[: len(train) + len(validation)]
    test = read_saved(tmp_path / "s", "test")
    assert test == (others or LINES[len(train) + len(validation) :])


@pytest.mark.parametrize(
    ("names", "split", "says"),
    [
        (["dev", "eval"], "train", "has the splits dev, eval, expected train"),
        (["train", "validation"], "test", "has the splits train, validation, and no test"),
    ],
)
def test_a_split_that_is_not_there_is_named(names, split, says, tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": LINES}) for name in names}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "s")
    with pytest.raises(janus.HandoffError, match=says):
        read_saved(tmp_path / "s", split)


def test_the_format_of_a_saved_folder_hides_no_column(tmp_path):
    saved = datasets.Dataset.from_dict({"text": LINES, "id": list(range(len(LINES)))})
    saved.with_format("numpy", columns=["id"]).save_to_disk(tmp_path / "s")
    assert read_saved(tmp_path / "s", "train")[0] == LINES[0]


def test_a_damaged_tokenizer_of_a_folder_is_not_blamed_on_the_hub(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(janus.HandoffError, match="cannot be read") as error:
        janus.load_tokenizer(str(tmp_path), "builtin", tmp_path)
    assert "hub" not in str(error.value).lower()


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
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert docs == janus.builtin_documents.__wrapped__()  # in this process alone
    paragraphs = [p for text in docs.values() for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 5000
    assert sum(map(len, paragraphs)) > 1_500_000
    monkeypatch.setattr(janus, "builtin_documents", lambda: docs)
    parts = [janus.read_documents("builtin", s) for s in ("train", "validation", "test")]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(docs.values())
    assert len(parts[0]) > 10 * len(parts[1]) > 0


def test_what_a_process_does_not_send_is_read_here(monkeypatch):
    """One that is killed, one that cannot start, none at all: the same results in the same order."""
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    files = [Path(f"{i}") for i in range(20)]
    expected = [f"{i}" for i in range(20)]
    parent = os.getpid()

    def killed(file: Path) -> str:
        if os.getpid() != parent and file.name == "4":
            os.kill(os.getpid(), signal.SIGKILL)
        return file.name

    assert janus.on_all_cores(killed, files, "") == expected
    with monkeypatch.context() as m:
        m.setattr(os, "fork", Mock(side_effect=OSError("no more processes")))
        assert janus.on_all_cores(str, files, "") == expected
    assert janus.on_all_cores(str, [], "") == []
    assert janus.on_all_cores(str, files[:1], "") == ["0"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no such processes")
def test_processes_that_read_end_with_the_one_that_asked(tmp_path):
    """Killed, it cannot end them itself."""
    code = "import janus_adaptive as janus, pathlib, time\n"
    code += "much = lambda _: time.sleep(0.01) or 'x' * 10_000\n"  # more than a pipe holds
    code += "janus.on_all_cores(much, [pathlib.Path()] * 1000, '')"
    started = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    for _ in range(1200):  # a minute
        time.sleep(0.05)
        if count_of_group(started.pid) > 1:
            break
    assert started.poll() is None
    started.kill()
    started.wait()
    for _ in range(1200):
        if not count_of_group(started.pid):
            return
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    raise AssertionError("a process of a group whose first was killed is still there")


def count_of_group(group: int) -> int:
    """How many processes of a process group run."""
    n = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, of_group = path.read_text().rpartition(") ")[2].split()[:3]
            n += int(of_group) == group and state != "Z"  # Z: ended, but not waited for
    return n


def test_builtin_says_which_package_it_lacks(monkeypatch):
    packages = {"numpy": "numpy", "absent": "no-such-package"}
    monkeypatch.setattr(janus, "BUILTIN_PACKAGES", packages)
    with pytest.raises(janus.HandoffError, match="no-such-package, which is not installed: pip"):
        janus.dataset_key("builtin")


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


# ---- text is data: nothing about it is guessed, and no file's hidden state changes it
def write_tokenizer(path):
    """A byte-level tokenizer that was saved with padding, truncation and dropout switched on."""
    bpe = janus.train_bpe(LINES, 300)
    bpe.save(str(path.with_name("plain.json")))
    bpe.enable_padding(length=64, pad_id=0, pad_token="!")
    bpe.enable_truncation(5)
    bpe.model.dropout = 0.5
    bpe.save(str(path))
    return path


def test_padding_truncation_and_dropout_of_a_tokenizer_file_do_not_touch_the_tokens(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    saved = write_tokenizer(tmp_path / "padded.json")
    assert json.loads(saved.read_text())["padding"] and json.loads(saved.read_text())["truncation"]
    streams = []
    for name, cache in (("plain", "one"), ("padded", "two")):
        tokenizer = str(tmp_path / f"{name}.json")
        data = janus.HFWikiTextLoader(str(text), tokenizer, 16, "train", tmp_path / cache)
        streams.append(data)
    assert np.array_equal(streams[0].tokens, streams[1].tokens)
    assert streams[0].description["tokenizer_hash"] == streams[1].description["tokenizer_hash"]
    expected = "".join(t + "\n\n" for t in janus.read_documents(str(text), "train"))
    assert streams[1].tokenizer.decode(streams[1].tokens.tolist()) == expected


def test_padding_of_a_tokenizer_folder_is_switched_off(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    saved = write_tokenizer(tmp_path / "padded.json")
    PreTrainedTokenizerFast(tokenizer_file=str(saved)).save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(janus, "from_hub", lambda what, load: load())
    found = janus.load_tokenizer(str(tmp_path / "folder"), "builtin", tmp_path)
    assert found.padding is None and found.truncation is None
    assert len(found.encode("rain").ids) < 64
    assert len(found.encode(LINES[0]).ids) > 5


def save_texts(path, texts):
    """A column `text` in the format of the file's name; None is a missing value."""
    rows = [{"text": text} for text in texts]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
    return path


FORMATS = ["a.jsonl", "a.json", "a.parquet", "a.folder"]


@pytest.mark.parametrize("name", FORMATS)
def test_missing_values_are_left_out_and_counted(name, tmp_path, capsys):
    texts = [None if i % 4 == 3 else line for i, line in enumerate(LINES)]
    path = save_texts(tmp_path / name, texts)
    parts = [janus.read_documents(str(path), s) for s in ("train", "validation", "test")]
    assert parts[0] + parts[1] + parts[2] == [text for text in texts if text]
    said = capsys.readouterr().out
    assert said.count("100 rows") == 1 and "null" in said, said  # once, not for each split


def test_rows_without_the_column_and_nan_are_missing_too(tmp_path, capsys):
    rows = ['{"text": "rain"}', '{"words": "iron"}', '{"text": NaN}', "", '{"text": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows * 200), encoding="utf-8")
    texts = janus.read_documents(str(tmp_path / "a.jsonl"), "train")
    assert set(texts) == {"rain"}
    assert "400 rows" in capsys.readouterr().out


def test_missing_values_of_a_split_of_its_own(tmp_path):
    column = {"text": ["rain", None, "nan"]}
    parts = dict.fromkeys(("train", "validation"), datasets.Dataset.from_dict(column))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "s")
    assert janus.read_documents(str(tmp_path / "s"), "train") == ["rain", "nan"]


LOOKS_LIKE = ["007", "1e3", "true", "NaN", "None", "null", "2024-01-01", " 7 ", "-0", "1e400"]


@pytest.mark.parametrize("name", FORMATS)
def test_text_that_looks_like_something_else_stays_text(name, tmp_path):
    path = save_texts(tmp_path / name, LOOKS_LIKE * 20)
    parts = [janus.read_documents(str(path), s) for s in ("train", "validation", "test")]
    assert parts[0] + parts[1] + parts[2] == LOOKS_LIKE * 20


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_not_made_into_text(name, tmp_path):
    path = save_texts(tmp_path / name, [7, 8, 9] * 50)
    with pytest.raises(janus.HandoffError, match="row 1 of column `text` is 7, expected text"):
        janus.read_documents(str(path), "train")


def test_json_in_all_its_shapes(tmp_path):
    shapes = {
        "records.json": json.dumps([{"text": "rain"}, {"text": "iron"}]),
        "columns.json": json.dumps({"text": {"0": "rain", "1": "iron"}}),
        "lists.json": json.dumps({"text": ["rain", "iron"]}),
        "lines.json": '{"text": "rain"}\n{"text": "iron"}',  # JSON Lines under the other name
        "array.jsonl": json.dumps([{"text": "rain"}, {"text": "iron"}]),
        "windows.jsonl": '\ufeff{"text": "rain"}\r\n{"text": "iron"}\r\n',
    }
    for name, content in shapes.items():
        (tmp_path / name).write_bytes(content.encode())
        rows, _ = janus.read_rows(tmp_path / name, "train")
        assert list(rows) == ["rain", "iron"], name


def test_half_a_surrogate_pair_becomes_one_letter_that_utf_8_has(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab \\ud83d cd \\ud83d\\ude00"}\n' * 200, encoding="utf-8")
    data = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    assert data.tokenizer.decode(data.tokens.tolist()).startswith("ab \ufffd cd \U0001f600\n\n")


BORDERS = ["\u2028", "\u2029", "\u0085", "\f", "\v", "\x1c", "\x1e"]


@pytest.mark.parametrize("border", BORDERS)
def test_a_line_ends_at_a_line_end_alone(border, tmp_path):
    lines = [f"{line}{border}and more" for line in LINES]
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    parts = [janus.read_documents(str(path), s) for s in ("train", "validation", "test")]
    assert parts[0] + parts[1] + parts[2] == lines


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(LINES).encode())
    parts = [janus.read_documents(str(path), s) for s in ("train", "validation", "test")]
    assert parts[0] + parts[1] + parts[2] == LINES


def letters(alphabet, n):
    """n random letters in one line."""
    return "".join(np.random.default_rng(0).choice(list(alphabet), n))


CHINESE = letters("深海的鱼不知道水是什么因为它们从未离开过", 96_000)


@pytest.mark.parametrize(
    "text",
    [
        CHINESE,  # 288 kB
        letters("ACGT", 288_000),
        "rain " + CHINESE[:50_000] + " iron" * 500,
        letters(["e\u0301", "o", "ñ"], 60_000),
    ],
    ids=["chinese", "genome", "mixed", "accents"],
)
def test_a_line_without_spaces_is_cut_by_characters(text, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    parts = [janus.read_documents(str(path), s) for s in ("train", "validation", "test")]
    characters = [len("".join(part)) / len(text.replace(" ", "")) for part in parts]
    assert "".join("".join(part) for part in parts).replace(" ", "") == text.replace(" ", "")
    assert characters == pytest.approx([0.9, 0.05, 0.05], abs=0.02)
    data = janus.HFWikiTextLoader(str(path), "train:300", 16, "validation", tmp_path / "cache")
    assert data.n_windows > 10
    train = janus.HFWikiTextLoader(str(path), "train:300", 16, "train", tmp_path / "cache")
    assert len(train.document_starts) > 16


def test_a_few_short_texts_keep_their_words(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["rain", "iron and rain"] * 10), encoding="utf-8")
    parts = [janus.read_documents(str(path), s) for s in ("train", "validation", "test")]
    assert sum(parts, []) == ["rain", "iron and rain"] * 10


@pytest.mark.parametrize(
    "text", ["", "a", "a b", "aaa bbb", " aaa", "aaaa", "a  b  c", "aaaabbbb c "]
)
def test_cut_loses_nothing_but_the_space_at_a_cut(text):
    pieces = janus.cut(text, 3)
    assert all(len(piece) <= 3 for piece in pieces)
    place = 0
    for piece in pieces:
        if text[place : place + len(piece)] != piece:
            assert text[place] == " "
            place += 1
        assert text[place : place + len(piece)] == piece
        place += len(piece)
    assert text[place:].strip() == ""


def with_gaps(path, largest):
    """A tokenizer of a few words, whose last one has the id `largest`."""
    words = sorted({word for line in LINES for word in line.split()})
    ids = {word: i for i, word in enumerate(["[UNK]", *words])}
    ids["rain,"] = largest
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


def test_sizes_come_from_the_largest_id_not_from_the_number_of_tokens(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    tokenizer = with_gaps(tmp_path / "gaps.json", 70_000)
    data = janus.HFWikiTextLoader(str(text), tokenizer, 16, "train", tmp_path / "cache")
    assert data.tokens.max() == 70_000  # 16 bits would have made it 4,464
    assert janus.count_ids(data.tokenizer) == 70_001 > data.tokenizer.get_vocab_size()


def test_a_vocabulary_with_gaps_trains(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    tokenizer = with_gaps(tmp_path / "gaps.json", 2000)
    argv = ["--preset", "smoke", "--steps", "2", "--dataset", str(text), "--tokenizer", tokenizer]
    argv += ["--seq_len", "16", "--dtype", "float32", "--save_dir", str(tmp_path / "out")]
    argv += ["--cache_dir", str(tmp_path / "cache")]
    assert janus.main(argv) == 0
    out = tmp_path / "out" / "janus_adaptive_final.pt"
    model, _ = janus.load_checkpoint(out, torch.device("cpu"), False)
    assert model.cfg.vocab_size == 2001


def test_names_and_tokens_of_a_csv_stay_text(tmp_path):
    path = tmp_path / "a.csv"
    words = ["007", "null", "1e3", "nan", "NA"]
    table = pd.DataFrame({"run": words, "next": words, "value": [1.5, np.nan, 2, 3, np.inf]})
    table.to_csv(path, index=False)
    found = janus.csv_table(path)
    assert found["run"].tolist() == found["next"].tolist() == words
    assert np.array_equal(found["value"], table["value"], equal_nan=True)


def test_tokens_cached_by_an_older_reader_are_not_served(tmp_path):
    """Its cache holds the tokens of "nan" and of split lines under the name without a version."""
    text = tmp_path / "a.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    data = janus.HFWikiTextLoader(str(text), "train:300", 16, "train", tmp_path / "cache")
    key = data.description["dataset_key"]
    old = tmp_path / "cache" / f"{key}-{data.description['tokenizer_hash']}-train.npy"
    assert not old.exists()
    np.save(old, data.tokens[:100])
    np.save(old.with_suffix(".documents.npy"), data.document_starts[:1])
    again = janus.HFWikiTextLoader(str(text), "train:300", 16, "train", tmp_path / "cache")
    assert len(again.tokens) == len(data.tokens)


def test_statements_are_those_of_ast_walk_in_its_order():
    """The built-in text is the same documents in the same order as by walking every expression."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for module in (janus, ast, threading, subprocess, np.lib, torch.nn.functional):
        file = Path(module.__file__)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        walked = [node for node in ast.walk(tree) if isinstance(node, documented)]
        found = [node for node in janus.statements(tree) if isinstance(node, documented)]
        assert found == walked
