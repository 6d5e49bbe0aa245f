#!/usr/bin/env python3
"""Checks that shared regions are the same bytes in every script, and nothing else stands twice.

    python tools/check_copies.py           # says what differs; exit status 1 if anything does
    python tools/check_copies.py --fix     # copies each region from its owner into the others

Every script stands alone, so what several need is copied whole, between two lines:

    # >>> shared: files ---- edit in janus_adaptive.py, then: python tools/check_copies.py --fix
    # <<< shared: files

The owner is the script that the first line names. Reads the *.py files of --root, as bytes.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

# From the line that names the region to the line that ends the same one
REGION = re.compile(
    rb"^# >>> shared: (?P<name>[a-z_]+) ---- edit in (?P<owner>\w+\.py), [^\n]*\n"
    rb"(?P<body>.*?)^# <<< shared: (?P=name)\n",
    re.MULTILINE | re.DOTALL,
)
# Anything that looks like one of the two lines: a misspelt one must not hide a region
MARKER = re.compile(rb"^#\s*(?:>>>|<<<)\s*shared\b", re.MULTILINE)
# A function, class or constant at the left margin: its name, and all lines that belong to it.
DEFINITION = re.compile(
    rb"^(?:@[^\n]*\n)*"
    rb"(?:(?:(?:async )?def|class) (?P<function>\w+)|(?P<constant>\w+)(?:: [^=\n]+)? = )[^\n]*\n"
    rb"(?:(?:[ \t)\]}][^\n]*)?\n)*",
    re.MULTILINE,
)
ALLOWED_TWICE = {"main", "run", "parse_args", "check_args"}  # each script has its own


def regions(text: bytes) -> dict[str, re.Match[bytes]]:
    """The shared regions of a script by name."""
    return {match["name"].decode(): match for match in REGION.finditer(text)}


def definitions(text: bytes) -> dict[str, bytes]:
    """Top-level functions, classes and constants of a text: name -> source."""
    found = {}
    for match in DEFINITION.finditer(text):
        name = match["function"] or match["constant"]
        found[name.decode()] = match[0].rstrip()
    return found


def line_of(text: bytes, position: int) -> int:
    """Number of the line, from 1, at a position in bytes."""
    return text.count(b"\n", 0, position) + 1


def compare_regions(scripts: dict[str, bytes]) -> list[str]:
    """A line for each region that differs from its owner's, and each marker without its partner."""
    problems = []
    for script, text in scripts.items():
        found = regions(text)
        # A broken marker leaves its partner alone, so that the numbers differ
        n_markers = len(MARKER.findall(text))
        if n_markers != 2 * len(found):
            problems.append(
                f"{script}: {n_markers} marker lines, expected two each for {sorted(found)}"
            )
        for name, match in found.items():
            owner = match["owner"].decode()
            # The marker lines are compared too: they name the owner
            original = regions(scripts.get(owner, b"")).get(name)
            where = f"{script}:{line_of(text, match.start())}"
            if original is None:
                problems.append(f"{where}: {owner} has no region {name}")
            elif original[0] != match[0]:
                problems.append(f"{where}: region {name} differs from {owner}; run with --fix")
    return problems


def compare_definitions(scripts: dict[str, bytes]) -> list[str]:
    """A line for each function in two scripts outside regions, and each name that a region has."""
    shared_names = {}  # definition -> region
    for text in scripts.values():
        for name, match in regions(text).items():
            shared_names.update(dict.fromkeys(definitions(match["body"]), name))
    # What stands outside regions in two scripts could drift apart unseen
    problems = []
    holders = defaultdict(list)  # name and source -> the scripts that have it
    for script, text in scripts.items():
        for name, source in definitions(REGION.sub(b"", text)).items():
            if name in shared_names:
                problems.append(f"{script}: {name} is defined by the region {shared_names[name]}")
            # Constants of different scripts may well be alike
            is_function = source.startswith((b"def ", b"class ", b"async ", b"@"))
            if is_function and name not in ALLOWED_TWICE:
                holders[name, source].append(script)
    for (name, _), found_in in holders.items():
        if len(found_in) > 1:
            problems.append(f"{' and '.join(found_in)}: the same {name}; make it a shared region")
    return problems


def fix(scripts: dict[str, bytes], root: Path) -> None:
    """Writes the owner's text of each region into every script that has the region."""
    for script, text in scripts.items():
        for name, match in regions(text).items():
            original = regions(scripts.get(match["owner"].decode(), b"")).get(name)
            if original is not None:  # a region without owner is told by compare_regions
                text = text.replace(match[0], original[0])
        if text != scripts[script]:  # an equal file keeps its time, so that make remakes nothing
            (root / script).write_bytes(text)
            scripts[script] = text
            print(f"fixed {script}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=here, help="folder of the scripts")
    parser.add_argument("--fix", action="store_true", help="copy each region from its owner")
    args = parser.parse_args(argv)
    scripts = {path.name: path.read_bytes() for path in sorted(args.root.glob("*.py"))}
    if args.fix:  # then look again: --fix does not mend what stands outside regions
        fix(scripts, args.root)
    problems = compare_regions(scripts) + compare_definitions(scripts)
    print("\n".join(problems) or f"{len(scripts)} scripts: all shared regions are equal")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
