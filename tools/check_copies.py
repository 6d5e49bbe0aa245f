#!/usr/bin/env python3
"""Check that the blocks that the scripts share are still the same code.

Each top-level script can be read and copied on its own, so it carries its own copy of the model, the loader and the
file helpers. One script owns a block; the others say where theirs comes from, on the comment line(s) directly above
the top-level def, class or constant (above its decorators):

    # Copied from: janus_adaptive.py::RMSNorm
    # Variant of: janus_adaptive.py::NewGPT @1a2b3c4d -- returns the per-head outputs
    # Local: shares only its name with the one in train_sae.py

A copy equals its owner's text from the first decorator to the last line, comments included: they carry the shapes.
The hash of a variant is the first 8 hex digits of the sha256 of that text. Problems print as `file:line: CODE text`:

    C000  the script cannot be read: not UTF-8, or a syntax error
    C001  a marker that is malformed, doubled, nearly a marker, or not directly above a block
    C002  the source file, or the name in it, does not exist
    C003  a copy differs from its owner in meaning (AST)
    C004  a copy differs from its owner in comments or layout only
    C005  the source is itself a copy or a variant
    C006  the owner changed since the hash of this variant was taken
    C007  the same top-level name in two scripts, with no marker
    C008  the same code, but a name that it uses is another import, constant or block here
    C009  the same function or class under another name, with no marker

Usage; exit status 0 (in step), 1 (problems) or 2 (wrong arguments, or cannot write):

    python tools/check_copies.py                                    # check every script
    python tools/check_copies.py --fix                              # owner -> copies
    python tools/check_copies.py --adopt train_sae.py::RMSNorm      # this copy -> owner -> all copies
    python tools/check_copies.py --ack ablation_test.py::NewGPT     # variant reviewed against its owner
"""

import argparse
import ast
import difflib
import hashlib
import io
import os
import re
import shutil
import subprocess
import symtable
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

MAIN_OWNER = "janus_adaptive.py"  # preferred as the owner when no marker says who owns a name
EXEMPT = re.compile(r"main|parse_args|check_args|SCRIPT|_|__\w+__")  # every script has its own, by design
MIN_TWIN_NODES = 20  # syntax nodes; anything smaller may well be written twice by chance

SOURCE = r"(?P<file>[\w./-]+\.py)::(?P<name>\w+)"
MARKERS = {
    "copy": re.compile(rf"# Copied from: {SOURCE}"),
    "variant": re.compile(rf"# Variant of: {SOURCE} @(?P<sha>[0-9a-f]{{8}}) -- \S.*"),
    "local": re.compile(r"# Local: \S.*"),
}
# What a person who means a marker may type instead. A misspelt marker that passes in silence is a copy nobody checks.
NEAR_MISS = re.compile(
    r"#\W*(copied[\s_-]*from|variant[\s_-]*of|local\s*(:|--)|(cop\w*|var\w*nt)\W+(\w+\W+)?[\w./-]+(\.py\b|::))",
    re.IGNORECASE,
)
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
INNER_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Problem(NamedTuple):
    """One finding, at a 1-based line."""

    file: str
    line: int
    code: str
    text: str


@dataclass(eq=False)
class Block:
    """The top-level statement (several if they share a line) that binds `names`, and its marker."""

    file: str
    names: list[str]
    start: int  # 0-based first line, decorators included, markers excluded
    end: int  # 0-based, exclusive
    text: str
    kind: str = ""  # "" (owner), "copy", "variant", "local", or "bad": has a marker, reported as C001
    source: tuple[str, str] = ("", "")  # file and name that a copy or variant points at
    sha: str = ""
    marker_line: int = -1  # 0-based

    def __post_init__(self) -> None:
        self.meaning = ast.dump(ast.parse(self.text))
        self.hash = hashlib.sha256(self.text.encode()).hexdigest()[:8]

    def __str__(self) -> str:
        return f"{self.file}::{self.source[1] if self.source[1] in self.names else self.names[0]}"

    def problem(self, code: str, text: str, offset: int = 0) -> Problem:
        return Problem(self.file, self.start + offset + 1, code, text)


@dataclass
class Script:
    """One parsed script. `imports` maps each imported name to the dotted things that it may stand for."""

    file: str
    newline: str
    lines: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    imports: dict[str, set[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def find(self, name: str) -> Block | None:
        """The block that binds `name` last, which is the one that counts at run time."""
        return next((b for b in reversed(self.blocks) if name in b.names), None)


Repo = dict[str, Script]


def fail(text: str) -> NoReturn:
    """End with one line on what stops this run."""
    print(f"check_copies: {text}", file=sys.stderr)
    raise SystemExit(2)


# ---- Reading scripts -------------------------------------------------------------------------------------------------


def bound_names(stmt: ast.stmt) -> tuple[list[str], dict[str, set[str]]]:
    """Names that a module-level statement binds: by definition or assignment, and by import (name -> targets)."""
    names: dict[str, None] = {}  # a dict because that keeps the order
    imports: dict[str, set[str]] = {}
    todo: list[ast.AST] = [stmt]
    while todo:
        node = todo.pop(0)
        if isinstance(node, DEFS):
            names[node.name] = None
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]  # `import a.b` binds a, `import a.b as c` binds a.b
                imports.setdefault(alias.asname or top, set()).add(alias.name if alias.asname else top)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                target = f"{'.' * node.level}{node.module or ''}.{alias.name}"
                imports.setdefault(alias.asname or alias.name, set()).add(target)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
        elif not isinstance(node, INNER_SCOPES) and not (isinstance(node, ast.AnnAssign) and node.value is None):
            todo += ast.iter_child_nodes(node)
    # `try: import x` / `except ImportError: x = None` is an import with a fallback, not a block of its own.
    return [name for name in names if name not in imports], imports


def attach_markers(script: Script, comments: dict[int, tuple[int, str]]) -> None:
    """Give each block the marker directly above it; `comments` maps a 0-based line to (column, text)."""
    below: dict[int, Block] = {}  # comment line -> the block that it stands above
    for block in script.blocks:
        line = block.start - 1
        while line in comments and comments[line][0] == 0:
            below[line] = block
            line -= 1
    for line, (_, comment) in sorted(comments.items()):
        kind, match = next(((k, m) for k, rx in MARKERS.items() if (m := rx.fullmatch(comment))), ("bad", None))
        if not match and not NEAR_MISS.match(comment):
            continue
        target = below.get(line)
        if target is None:
            text = "marker is not directly above a top-level def, class or constant"
        elif not match or target.kind:
            text = "second marker on one block" if match else "not a marker as it stands (reword it if it is prose)"
            target.kind = "bad"
        else:
            found = match.groupdict(default="")
            target.kind, target.marker_line, target.sha = kind, line, found.get("sha", "")
            target.source = (found.get("file", ""), found.get("name", ""))
            continue
        script.problems.append(Problem(script.file, line + 1, "C001", f"{text}: {comment!r}"))


def parse_script(file: str, raw: bytes) -> Script:
    """Parse one script; one that cannot be parsed comes back with no lines, and with its one problem."""
    script = Script(file, "\r\n" if b"\r\n" in raw else "\n")
    try:
        source = raw.decode("utf-8-sig").replace("\r\n", "\n")
        body = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError) as error:  # ValueError: not UTF-8, or a null byte
        line = getattr(error, "lineno", None) or 1
        script.problems.append(Problem(file, line, "C000", f"cannot be read: {getattr(error, 'msg', error)}"))
        return script

    script.lines = source.split("\n")  # not splitlines(), which also splits at form feeds and so loses count
    spans: list[list] = []  # [start, end, names]
    for node in body:
        # The names under `if __name__ == "__main__":` belong to a run, not to the module.
        guard = isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ ==")
        names, imports = ([], {}) if guard else bound_names(node)
        for name, targets in imports.items():
            script.imports.setdefault(name, set()).update(targets)
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        if spans and start < spans[-1][1]:  # `A = 1; B = 2`: lines are what is copied, so these are one block
            spans[-1][1:] = node.end_lineno, spans[-1][2] + names
        else:
            spans.append([start, node.end_lineno, names])
    for start, end, names in spans:
        if names:
            script.blocks.append(Block(file, names, start, end, "\n".join(script.lines[start:end])))
    comments = (token for token in tokens if token.type == tokenize.COMMENT)
    attach_markers(script, {c.start[0] - 1: (c.start[1], c.string.rstrip()) for c in comments})
    return script


def load(root: Path) -> Repo:
    """All top-level scripts of the repository, by file name."""
    paths = sorted(path for path in root.glob("[!.]*.py") if path.is_file())
    # Nothing to check is an error: a wrong --root must not pass for a repository in step.
    return {p.name: parse_script(p.name, p.read_bytes()) for p in paths} or fail(f"no *.py scripts in {root}")


# ---- Checks ----------------------------------------------------------------------------------------------------------


def owner_of(repo: Repo, block: Block) -> Block | None:
    """The owner that a copy or a variant names; None where it names none, or something that is no owner."""
    owner = repo[block.source[0]].find(block.source[1]) if block.source[0] in repo else None
    return owner if owner and owner.kind not in ("copy", "variant") else None


def check_source(repo: Repo, block: Block) -> Iterator[Problem]:
    """C002 to C006: one copy or variant against the owner that it names."""
    file, name = block.source
    owner = owner_of(repo, block)
    if file not in repo:
        yield block.problem("C002", f"{file} is not one of the scripts")
    elif not repo[file].lines:
        return  # unreadable: its C000 line is the one to act on
    elif owner is None and (middle := repo[file].find(name)):
        yield block.problem("C005", f"{middle} is no owner but a {middle.kind} of {'::'.join(middle.source)}")
    elif owner is None:
        yield block.problem("C002", f"{file} defines no {name}")
    elif block.kind == "variant":
        if block.sha != owner.hash:
            text = f"{owner} changed since this variant was reviewed: @{block.sha} is now @{owner.hash}"
            yield block.problem("C006", f"{text}; port what applies, then --ack {block}")
    elif name not in block.names:
        yield block.problem("C003", f"{block.names[0]} is a copy of {owner} under another name; rename one of them")
    elif block.text != owner.text:
        code, how = ("C003", "in meaning") if block.meaning != owner.meaning else ("C004", "in comments or layout only")
        mine, theirs = ([*b.text.split("\n"), "the end"] for b in (block, owner))
        at = next(i for i, (here, there) in enumerate(zip(mine, theirs, strict=False)) if here != there)
        text = f"{name} differs from {owner} {how}; first: {mine[at].strip()!r} here, {theirs[at].strip()!r} there"
        yield block.problem(code, text, at)


def origin(repo: Repo, file: str, name: str, seen: tuple[str, ...] = ()) -> Block | str:
    """What `name` stands for in a script: the owner's block, or an import; "" for a builtin or nothing."""
    if block := repo[file].find(name):
        return (block.kind == "copy" and owner_of(repo, block)) or block
    targets = sorted(repo[file].imports.get(name, ()))
    module, _, attribute = targets[0].rpartition(".") if len(targets) == 1 else ("", "", "")
    if f"{module}.py" in repo and targets[0] not in seen:  # one script imports from another: look through it
        return origin(repo, f"{module}.py", attribute, (*seen, targets[0])) or f"import {targets[0]}"
    return f"import {' or '.join(targets)}" if targets else ""


def check_free_names(repo: Repo, block: Block) -> Iterator[Problem]:
    """C008: a copy that reads as its owner does, and means something else because its surroundings differ."""
    owner = owner_of(repo, block)
    if block.kind != "copy" or owner is None or block.meaning != owner.meaning:
        return
    names, tables = set(), [symtable.symtable(block.text, block.file, "exec")]
    while tables:
        table = tables.pop()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    for name in sorted(n for n in names.difference(block.names) if not EXEMPT.fullmatch(n)):
        pair = origin(repo, block.file, name), origin(repo, owner.file, name)
        if pair[0] == pair[1]:
            continue
        blocks = [x for x in pair if isinstance(x, Block)]
        if len(blocks) == 2:
            # A variant is a difference that somebody looked at and gave a reason for.
            reviewed = any(a.kind == "variant" and owner_of(repo, a) is b for a, b in (blocks, blocks[::-1]))
            if reviewed or blocks[0].meaning == blocks[1].meaning:
                continue
        here, there = (f"{x.file}:{x.start + 1}" if isinstance(x, Block) else x or "undefined" for x in pair)
        yield block.problem("C008", f"{block} reads as in {owner.file}, but `{name}` is {here} here, {there} there")


def fingerprint(block: Block) -> str:
    """AST of one function or class without its name and docstring; "" for other blocks and for trivial ones."""
    node = ast.parse(block.text).body[0]  # a fresh tree, because it is changed below
    if not isinstance(node, DEFS):
        return ""
    if ast.get_docstring(node, clean=False) is not None:
        del node.body[0]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id == node.name:
            inner.id = "_"  # a recursive call
    node.name = "_"
    return ast.dump(node) if sum(not isinstance(n, ast.expr_context) for n in ast.walk(node)) >= MIN_TWIN_NODES else ""


def check_unmarked(repo: Repo) -> Iterator[Problem]:
    """C007 and C009: blocks that are written twice without a word about it."""
    every = [block for script in repo.values() for block in script.blocks]
    cited = {block.source for block in every}
    # Owners first: what a marker points at, then the main owner's blocks, then the first in reading order.
    every.sort(key=lambda b: (cited.isdisjoint((b.file, n) for n in b.names), b.file != MAIN_OWNER, b.file, b.start))
    by_name: dict[str, Block] = {}
    by_code: dict[str, Block] = {}
    for block in every:
        if block.kind:
            continue
        for name in block.names:
            first = by_name.setdefault(name, block)
            if first.file != block.file and not EXEMPT.fullmatch(name):
                text = f"{name} is also at {first.file}:{first.start + 1}; mark it Copied from, Variant of or Local"
                yield block.problem("C007", text)
        if code := fingerprint(block):
            first = by_code.setdefault(code, block)
            if first.names != block.names:
                text = f"{block} is the {first.names[0]} of {first.file}:{first.start + 1} under another name"
                yield block.problem("C009", f"{text}; keep one of the two")


def check(repo: Repo) -> list[Problem]:
    """All problems of the repository, sorted by place."""
    problems = [problem for script in repo.values() for problem in script.problems]
    for block in (block for script in repo.values() for block in script.blocks):
        if block.kind in ("copy", "variant"):
            problems += [*check_source(repo, block), *check_free_names(repo, block)]
    return sorted([*problems, *check_unmarked(repo)])


# ---- Repairs ---------------------------------------------------------------------------------------------------------


def write_edits(root: Path, repo: Repo, edits: list[tuple[str, int, int, str]]) -> None:
    """Replace lines start:end of a file by text, for each (file, start, end, text); print the diffs."""
    for file in sorted({edit[0] for edit in edits}):
        lines, path = list(repo[file].lines), (root / file).resolve()
        for _, start, end, text in sorted((e for e in edits if e[0] == file), reverse=True):  # from the bottom up
            lines[start:end] = text.split("\n")
        print(*difflib.unified_diff(repo[file].lines, lines, f"a/{file}", f"b/{file}", n=2, lineterm=""), sep="\n")
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(repo[file].newline.join(lines).encode())
            shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except OSError as error:
            fail(f"cannot write {file}, which is as it was: {error}")
        finally:
            temporary.unlink(missing_ok=True)


def at_head(root: Path, file: str, name: str) -> str | None:
    """Text of a block at git HEAD; None where there is no git, no HEAD, or no such block."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{file}"], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    block = parse_script(file, shown.stdout).find(name)
    return block.text if block else None


def fix(root: Path, repo: Repo, files: list[str]) -> None:
    """Write each owner's text over its stale copies, except where that would undo an edit made in the copy."""
    edits = []
    for block in (block for file in files for block in repo[file].blocks if block.kind == "copy"):
        owner, name = owner_of(repo, block), block.source[1]
        if owner is None or name not in block.names or block.text == owner.text:
            continue
        before = at_head(root, block.file, name)
        if before not in (None, block.text) and at_head(root, owner.file, name) == owner.text:
            keep = f"--adopt {block} keeps the edit, `git checkout -p {block.file}` drops it"
            print(f"refused {block}: edited since HEAD, while {owner} was not; {keep}", file=sys.stderr)
        else:
            edits.append((block.file, block.start, block.end, owner.text))
    write_edits(root, repo, edits)


def pick(repo: Repo, argument: str, kind: str) -> tuple[Block, Block]:
    """The copy or variant that FILE::Name names, and its owner."""
    file, _, name = argument.partition("::")
    if file not in repo or not name:
        fail(f"{argument!r} is not FILE::Name with one of the scripts")
    block = repo[file].find(name) or fail(f"{file} {'defines no ' + name if repo[file].lines else 'cannot be parsed'}")
    if block.kind != kind:
        fail(f"{argument} has no {kind} marker")
    owner = owner_of(repo, block)
    if owner is None or (kind == "copy" and block.source[1] not in block.names):
        fail(f"{argument} points at {'::'.join(block.source)}, which is not its owner; run the check")
    return block, owner


def adopt(root: Path, repo: Repo, argument: str) -> None:
    """Take the text of a copy into its owner and into every other copy of that owner."""
    chosen, owner = pick(repo, argument, "copy")
    copies = [b for script in repo.values() for b in script.blocks if b.kind == "copy" and owner_of(repo, b) is owner]
    stale = [b for b in [owner, *copies] if b.text != chosen.text and chosen.source[1] in b.names]
    write_edits(root, repo, [(b.file, b.start, b.end, chosen.text) for b in stale])


def ack(root: Path, repo: Repo, argument: str) -> None:
    """Write the present hash of the owner into the marker of a variant."""
    variant, owner = pick(repo, argument, "variant")
    text = repo[variant.file].lines[variant.marker_line].replace(f"@{variant.sha} --", f"@{owner.hash} --", 1)
    write_edits(root, repo, [(variant.file, variant.marker_line, variant.marker_line + 1, text)])


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Check, after the repair that was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="report on, and --fix, these only (default: all)")
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=here, help="repository root (default: the one of this tool)")
    repair = parser.add_mutually_exclusive_group()
    repair.add_argument("--fix", action="store_true", help="write owners over their stale copies, and show the diff")
    repair.add_argument("--adopt", metavar="FILE::Name", help="take this copy into its owner, then into every copy")
    repair.add_argument("--ack", metavar="FILE::Name", help="this variant was reviewed: refresh the hash of its owner")
    args = parser.parse_args(argv)
    repo = load(args.root)
    files = args.scripts or list(repo)
    if unknown := [file for file in files if file not in repo]:
        fail(f"{unknown[0]} is not one of the scripts in {args.root}")
    if args.fix:
        fix(args.root, repo, files)
    elif args.adopt is not None:
        adopt(args.root, repo, args.adopt)
    elif args.ack is not None:
        ack(args.root, repo, args.ack)

    repo = load(args.root)
    problems = [problem for problem in check(repo) if problem.file in files]
    for problem in problems:
        print("{}:{}: {} {}".format(*problem))
    if problems:
        return 1
    kinds = [block.kind for script in repo.values() for block in script.blocks]
    print(f"{len(files)} scripts, {kinds.count('copy')} copies, {kinds.count('variant')} variants: all in step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
