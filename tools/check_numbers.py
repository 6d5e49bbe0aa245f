#!/usr/bin/env python3
"""Checks that README.md and RESULTS.md say what the files kept in docs/numbers/ hold.

    python tools/check_numbers.py             # says what differs; exit status 1 if anything does
    python tools/check_numbers.py --fix       # writes every block anew from the kept files
    python tools/check_numbers.py --collect   # keeps the files of the runs that are there
    python tools/check_numbers.py --collect demo=runs/mine   # or those of a run elsewhere

A number reaches a reader in one of three ways:

    block    Markdown between `<!-- numbers: NAME -->` and `<!-- end -->`, see number_blocks.py
    claim    a number in a sentence: a row of docs/numbers/claims.csv says where it stands in a file
    allowed  a number that no command printed: a row of docs/numbers/allowed.csv says why

Any other number in a sentence is a fault. Code, headings, link targets and whole numbers from 1 to
9 without a unit are not looked at.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import string
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from number_blocks import (
    BLOCKS,
    NUMBERS,
    PROVENANCE,
    SOURCES,
    Kept,
    NumbersError,
    Source,
    render_all,
)

DOCUMENTS = ("README.md", "RESULTS.md")
# Columns of the two lists that people write, in docs/numbers
CLAIMS = ["document", "phrase", "file", "row", "column", "tolerance", "why"]
ALLOWED = ["document", "phrase", "why"]


# ------------------------------------------------------------------------------------------ collect
def collect(root: Path, name: str, folder: Path) -> bool:
    """Copies the small files of a finished run into docs/numbers/<name>; whether there are any.

    Raises NumbersError, and keeps what was there, if a file is missing, was changed since it was
    written, or has no record of a run that ended well.
    """
    source = SOURCES[name]
    chosen = chosen_files(source, folder)
    if not chosen:
        return False
    if source.records:
        runs = [read_run(path, folder) for path in sorted(folder.glob(source.records))]
    else:
        runs = [unrecorded(root, source, chosen[0])]
    if not runs:
        raise NumbersError(f"{folder} has no {source.records}; run {source.command}")

    # From here on nothing is refused: what was kept before may go
    kept = root / NUMBERS / name
    shutil.rmtree(kept, ignore_errors=True)
    hashes = {}
    for path in chosen:
        relative = path.relative_to(folder)
        (kept / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept / relative)
        hashes[relative.as_posix()] = sha256(path)
    provenance = {"command": source.command, **this_machine(), "runs": runs, "files": hashes}
    # Last, as with the sidecars of the scripts: it vouches for the rest
    text = json.dumps(provenance, indent=1) + "\n"
    (kept / PROVENANCE).write_text(text, encoding="utf-8")
    return True


def chosen_files(source: Source, folder: Path) -> list[Path]:
    """The files to keep, each vouched for; none if the command has written none of them."""
    found = {pattern: sorted(folder.glob(pattern)) for pattern in (*source.files, *source.bare)}
    # Nothing at all: the command was not run. A part: it was not run to its end
    if not any(found.values()):
        return []
    # A refusal names the command, because nothing here may be mended by hand
    for pattern, paths in found.items():
        if not paths:
            raise NumbersError(f"{folder} has no {pattern}; run {source.command}")
        for path in paths:
            if pattern in source.bare:
                check_time(path, folder, source.bare[pattern], source.command)
            else:
                check_sidecar(path, source.command)
    return [path for paths in found.values() for path in paths]


def check_sidecar(path: Path, command: str) -> None:
    """Raises NumbersError unless the sidecar of a file has its hash."""
    sidecar = Path(f"{path}.json")
    if not sidecar.exists():
        raise NumbersError(f"{path} has no sidecar {sidecar.name}: unfinished; run {command}")
    # Sidecars are written last: with one the file is whole, with its hash it is the same file
    expected = json.loads(sidecar.read_text(encoding="utf-8"))["sha256"]
    if sha256(path) != expected:
        raise NumbersError(f"{path} is not what {sidecar.name} describes; run {command}")


def check_time(path: Path, folder: Path, records: str, command: str) -> None:
    """Raises NumbersError if a run of `records` began after the file was written: a later run would
    have another one."""
    for record in folder.glob(records) if records else []:
        # Not the end: a run writes its files before its record says that it ended
        began = read_run(record, folder)["time"]
        if path.stat().st_mtime < datetime.fromisoformat(began).timestamp():
            raise NumbersError(f"{path} is older than the run of {record}; run {command}")


def read_run(path: Path, folder: Path) -> dict[str, Any]:
    """What is kept of a run.json. Raises NumbersError unless the run ended well."""
    record = json.loads(path.read_text(encoding="utf-8"))
    # None: it is still running, or was killed
    if record["exit_status"] != 0:
        raise NumbersError(f"{path}: exit status {record['exit_status']}, expected 0")
    began = datetime.fromisoformat(record["time"])
    ended = datetime.fromisoformat(record["end"])
    # Nobody else has the folders of this machine
    words = [Path(word).name if word.startswith("/") else word for word in record["argv"]]
    return {
        "record": path.relative_to(folder).as_posix(),
        "script": record["script"],
        "argv": words,
        "time": record["time"],
        "seconds": (ended - began).total_seconds(),
        "commit": record["git"]["commit"],
        "dirty": record["git"]["dirty"],
        "torch": record["versions"]["torch"],
        "threads": record["hardware"]["threads"],
        "gpu": record["hardware"]["gpu"],
        "cost": record.get("cost", ""),
    }


def unrecorded(root: Path, source: Source, path: Path) -> dict[str, Any]:
    """What stands for a record where a command leaves none: the time of its file, this commit."""
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    # The time of the file, not of now: it may have been written days ago
    written = time.gmtime(path.stat().st_mtime)
    return {
        "script": source.command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S+0000", written),
        "commit": commit.stdout.strip() or "unknown",
        "dirty": changes.returncode == 1,
        "torch": "",
        "gpu": None,
    }


def this_machine() -> dict[str, Any]:
    """The processor, which run.json does not name: collect where you ran."""
    facts = {}
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            # A line a core and fact, all cores alike; empty lines between cores
            if ":" in line:
                name, value = line.split(":", 1)
                facts[name.strip()] = value.strip()
    # These two decide which kernels run, and with it how sums are rounded
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cpus": os.cpu_count(),
        "cpu_flags": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
    }


def sha256(path: Path) -> str:
    """Hex digest of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_kept(root: Path) -> list[str]:
    """A line for each kept file that is not as it was collected, or that nobody collected."""
    problems = []
    for name in SOURCES:
        folder = root / NUMBERS / name
        if not folder.exists():
            continue
        # Written last: without it a collection was cut off
        if not (folder / PROVENANCE).exists():
            problems.append(f"{folder}: no {PROVENANCE}; collect it again")
            continue
        # Both ways: a file that was changed or lost, and one that somebody put there
        expected = Kept(root).provenance(name)["files"]
        present = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != PROVENANCE:
                present[path.relative_to(folder).as_posix()] = sha256(path)
        for file in sorted(expected.keys() | present.keys()):
            if expected.get(file) != present.get(file):
                problems.append(f"{folder / file}: not what was collected; collect it again")
    return problems


# ------------------------------------------------------------------------------------------- blocks
BLOCK = re.compile(
    r"^<!-- numbers: (?P<name>[\w-]+) -->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)
# Anything that looks like one of the two lines: a misspelt one must not hide a block
MARKER = re.compile(r"<!--\s*(?:numbers\b|end\b)")


def fix(text: str, rendered: dict[str, str]) -> str:
    """The document with every block written anew; `rendered`: what render_all gives."""

    def anew(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in rendered:  # check_blocks tells it
            return match[0]
        return f"<!-- numbers: {name} -->\n{rendered[name]}\n<!-- end -->"

    return BLOCK.sub(anew, text)


def check_blocks(document: str, text: str, rendered: dict[str, str]) -> list[str]:
    """A line for each block of a document that differs, is missing, stands twice or is unknown."""
    problems = []
    names = []
    # What stands in the document is what its files say
    for match in BLOCK.finditer(text):
        name = match["name"]
        names.append(name)
        where = f"{document}:{line_of(text, match.start())}: block {name}"
        if name not in rendered:
            problems.append(f"{where} is not in tools/number_blocks.py")
        elif match["body"] != f"{rendered[name]}\n":
            problems.append(f"{where} differs from the kept files; run with --fix")
    # A broken marker leaves its partner alone, so that the numbers differ
    if len(MARKER.findall(text)) != 2 * len(names):
        problems.append(f"{document}: a marker of a block stands without its partner")
    # What should stand there does, once: nobody deletes a block unseen
    for name, block in BLOCKS.items():
        expected = 1 if block.document == document else 0
        if names.count(name) != expected:
            found = f"block {name} stands there {names.count(name)} times, expected {expected}"
            problems.append(f"{document}: {found}")
    return problems


def line_of(text: str, position: int) -> int:
    """Number of the line, from 1, at a position."""
    return text.count("\n", 0, position) + 1


# ---------------------------------------------------------------------------------------- sentences
# What is no sentence. The order matters: a fence may hold anything that follows.
NO_SENTENCE = (
    BLOCK,
    re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL),
    re.compile(r"(?<=\n\n)(?:    .*\n)+"),  # code, indented
    re.compile(r"^#.*$", re.MULTILINE),  # a heading
    re.compile(r"`(?:(?!\n\n)[^`])+`"),  # an unpaired one must not hide the next paragraph
    re.compile(r"\]\([^)\s]*\)"),  # where a link leads
)
# 84.95M, -.012, 1,652, 1e-6, 5 %; not the 3 of L3, of GPT-3 or of v0.3
DIGITS = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?:\s?%)?"
NUMBER = re.compile(rf"(?<![\w.,/-]){DIGITS}")
# Phase 4, two GPUs; but 4 of 7, 4x, 4 times are results
COUNTING_WORD = re.compile(r"(?<!\sof\s)[1-9](?![\w%]|\s%|\sof\s\d|\stimes|[.,]\d)")


def sentences(text: str) -> str:
    """The text with spaces for all that is no sentence; every character keeps its place."""
    # Lines stay where they are, so that a problem can name its line
    for pattern in NO_SENTENCE:
        text = pattern.sub(lambda match: blank(match[0]), text)
    return text


def blank(text: str) -> str:
    """Spaces in the place of everything but line breaks."""
    return re.sub(r"[^\n]", " ", text)


def as_pattern(words: str) -> str:
    """A regular expression for words, however the lines are broken."""
    return r"\s+".join(re.escape(word) for word in re.split(r"\s+", words))


@dataclass
class Claim:
    """A number in a sentence, and where it comes from."""

    phrase: str  # a template: the format of the number stands in its place
    value: float  # in the file
    tolerance: float  # by which the sentence may be off; 0: only by rounding

    def rendered(self) -> str:
        """The phrase as the file has it."""
        return self.phrase.format(self.value)

    def pattern(self) -> re.Pattern[str]:
        """The phrase with any number in the place of its own, which is the group `number`."""
        parts = list(string.Formatter().parse(self.phrase))
        # Its parser gives the text before the braces, and what follows them as another part
        before = parts[0][0]
        after = parts[1][0] if len(parts) > 1 else ""
        # What NUMBER must not follow, or a claim would take the end of another number
        number = rf"(?<![\w.,/-])(?P<number>{DIGITS})"
        return re.compile(f"{as_pattern(before)}{number}{as_pattern(after)}")

    def holds(self, number: str) -> bool:
        """Whether the number of the sentence is that of the file."""
        spec = list(string.Formatter().parse(self.phrase))[0][2]
        # As it rounds, it must be the same text: a digit more would be a digit invented
        if plain(number) == plain(format(self.value, spec or "")):
            return True
        return abs(as_float(number) - self.value) <= self.tolerance


def plain(number: str) -> str:
    """A number without what is a matter of style: 1,652 and 5 %."""
    return re.sub(r"[\s,]", "", number)


def as_float(number: str) -> float:
    """The value of a number; of a percentage the share."""
    text = plain(number)
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def read_list(root: Path, name: str, columns: list[str]) -> pd.DataFrame:
    """claims.csv or allowed.csv, as text. Raises NumbersError if it is another kind."""
    path = root / NUMBERS / name
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    # As text, so that nothing that looks like a number is rewritten
    if list(table.columns) != columns:
        raise NumbersError(f"{path} has the columns {list(table.columns)}, expected {columns}")
    return table


def read_claim(root: Path, row: pd.Series) -> Claim:
    """A row of claims.csv with the value that its file has. Raises NumbersError."""
    where = f"claims.csv: {row['phrase']!r}"
    # One number a claim, in one pair of braces without a name
    fields = [part[1] for part in string.Formatter().parse(row["phrase"]) if part[1] is not None]
    if fields != [""]:
        raise NumbersError(f"{where} needs one number in braces, such as {{:.2f}}")
    if row["tolerance"] and not row["why"]:
        raise NumbersError(f"{where} has a tolerance without a reason")
    # A deleted run takes its sentences along
    path = root / NUMBERS / row["file"]
    if not path.exists():
        raise NumbersError(f"{where}: {path} was not collected; delete the sentence and its claim")
    try:
        table = pd.read_csv(path)
        chosen = table.query(row["row"]) if row["row"] else table
        values = chosen[row["column"]].astype(float).tolist()
    except (KeyError, ValueError, SyntaxError, pd.errors.UndefinedVariableError) as e:
        raise NumbersError(f"{where}: {path} has no such number ({e})") from None
    # Of several rows it would be unclear which one the sentence is about
    if len(values) != 1:
        raise NumbersError(f"{where}: {len(values)} rows of {path}, expected one")
    return Claim(row["phrase"], values[0], float(row["tolerance"] or 0))


def check_sentences(root: Path, document: str, text: str) -> list[str]:
    """A line for each claim of a document that does not hold, each claim or allowance that nothing
    needs, and each number that has neither."""
    problems = []
    rest = sentences(text)
    # What is claimed or allowed is blanked out of `rest`, until only what nobody knows is left
    claims = read_list(root, "claims.csv", CLAIMS)
    for _, row in claims[claims["document"] == document].iterrows():
        claim = read_claim(root, row)
        found = list(claim.pattern().finditer(rest))
        if not found:
            problems.append(f"{document}: the sentence of a claim is gone: {row['phrase']!r}")
        # A phrase may stand twice: each of them must be right
        for match in found:
            if not claim.holds(match["number"]):
                where = f"{document}:{line_of(text, match.start())}"
                problems.append(f"{where}: {match[0]!r}, expected {claim.rendered()!r}")
            start, end = match.span("number")
            rest = rest[:start] + blank(rest[start:end]) + rest[end:]

    # A claim covers its number; an allowance covers the whole phrase
    allowed = read_list(root, "allowed.csv", ALLOWED)
    for _, row in allowed[allowed["document"] == document].iterrows():
        pattern = re.compile(as_pattern(row["phrase"]))
        if not pattern.search(rest):  # its sentence is gone: nobody would miss the reason
            problems.append(f"{document}: nothing needs the allowance of {row['phrase']!r}")
        if not row["why"]:
            problems.append(f"allowed.csv: {row['phrase']!r} without a reason")
        rest = pattern.sub(lambda match: blank(match[0]), rest)

    # What is left has neither
    for match in NUMBER.finditer(rest):
        if not COUNTING_WORD.match(rest, match.start()):
            where = f"{document}:{line_of(text, match.start())}"
            advice = "put it in a block, or claim it in docs/numbers/claims.csv"
            problems.append(f"{where}: no file has the number {match[0]!r}; {advice}")
    return problems


# ---------------------------------------------------------------------------------------------- run
def check(root: Path) -> list[str]:
    """A line for everything that is wrong."""
    # Files first: where they are wrong, so are the blocks
    problems = check_kept(root)
    rendered = render_all(root)  # once: every block reads files
    for document in DOCUMENTS:
        text = (root / document).read_text(encoding="utf-8")
        problems += check_blocks(document, text, rendered)
        problems += check_sentences(root, document, text)
    return problems


def collect_all(root: Path, places: list[str]) -> None:
    """Collects from `name=folder`, or from every command's own folder where it has run."""
    # `--collect` alone: every command has a folder of its own, where it writes by default
    if not places:
        places = [f"{name}={root / source.folder}" for name, source in SOURCES.items()]
    for place in places:
        name = place.split("=", 1)[0]
        folder = place.removeprefix(name).removeprefix("=")
        if name not in SOURCES or not folder:
            raise NumbersError(f"--collect {place}: expected NAME=FOLDER, NAME of {list(SOURCES)}")
        kept = collect(root, name, Path(folder))
        print(f"{name}: {'kept' if kept else 'nothing'} from {folder}")


def run(args: argparse.Namespace) -> int:
    # In this order, so that one call does all: collect, write, check
    if args.collect is not None:
        collect_all(args.root, args.collect)
    if args.fix:
        rendered = render_all(args.root)
        for document in DOCUMENTS:
            path = args.root / document
            text = path.read_text(encoding="utf-8")
            path.write_text(fix(text, rendered), encoding="utf-8")
    if args.collect is not None and not args.fix:
        return 0  # the blocks are not written yet: they would all differ
    problems = check(args.root)
    n_blocks = len(BLOCKS)
    print("\n".join(problems) or f"{n_blocks} blocks and all sentences say what the files hold")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=here, help="folder of the repository")
    parser.add_argument("--fix", action="store_true", help="write every block anew")
    parser.add_argument(
        "--collect",
        nargs="*",
        metavar="NAME=FOLDER",
        help=f"keep files of finished runs; NAME: {', '.join(SOURCES)} (default: all there are)",
    )
    try:
        return run(parser.parse_args(argv))
    except NumbersError as e:
        print(f"check_numbers.py: error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
