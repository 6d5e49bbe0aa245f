"""tools/check_copies.py: a changed byte in any region of any script is found and mended."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "check_copies.py"
spec = importlib.util.spec_from_file_location("check_copies", TOOL)
check_copies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_copies)

FILES = '''\
# >>> shared: files ---- edit in owner.py, then: python tools/check_copies.py --fix
class HandoffError(Exception):
    """The one line that the user reads."""


LIMIT = 3


def write(path):
    # an empty line inside belongs to it

    return path
# <<< shared: files
'''


@pytest.fixture
def repo(tmp_path):
    """Two scripts that share one region."""
    (tmp_path / "owner.py").write_text(f"import os\n\n\ndef method():\n    return 1\n\n\n{FILES}")
    (tmp_path / "other.py").write_text(f"import os\n\n\ndef method():\n    return 2\n\n\n{FILES}")
    return tmp_path


def check(root, *flags):
    return check_copies.main(["--root", str(root), *flags])


def real_regions():
    cases = []
    for path in sorted(ROOT.glob("*.py")):
        for name in check_copies.regions(path.read_bytes()):
            cases.append((path.name, name))
    return cases


def test_the_scripts_of_this_repository():
    assert check(ROOT) == 0
    assert len(real_regions()) > 40


@pytest.mark.parametrize(("script", "region"), real_regions())
def test_a_changed_byte_in_any_region_is_found_and_mended(script, region, tmp_path, capsys):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    path = tmp_path / script
    before = path.read_bytes()
    match = check_copies.regions(before)[region]
    for position in (
        match.start("body"),
        (match.start("body") + match.end("body")) // 2,
        match.end("body") - 2,
    ):
        changed = bytes([before[position] ^ 1])
        path.write_bytes(before[:position] + changed + before[position + 1 :])
        assert check(tmp_path) == 1
        said = capsys.readouterr().out
        assert f"region {region} differs" in said
        if script != match["owner"].decode():
            assert check(tmp_path, "--fix") == 0
            assert path.read_bytes() == before
        path.write_bytes(before)


def test_fix_pushes_the_owner_and_nothing_else(repo):
    owner = (repo / "owner.py").read_bytes()
    (repo / "owner.py").write_bytes(owner.replace(b"LIMIT = 3", b"LIMIT = 4"))
    assert check(repo, "--fix") == 0
    other = (repo / "other.py").read_bytes()
    assert b"LIMIT = 4" in other and b"return 2" in other


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# <<< shared: files\n", "", "marker lines"),
        ("# >>> shared: files ----", "# >>> shared: file ----", "marker lines"),
        ("return 2", "return 1", "other.py and owner.py: the same method"),
        ("def method", "LIMIT = 5\n\n\ndef method", "LIMIT is defined by the region files"),
        ("def method", "class HandoffError:\n    pass\n\n\ndef method", "HandoffError is defined"),
        ("edit in owner.py", "edit in missing.py", "missing.py has no region files"),
    ],
)
def test_what_is_said(repo, capsys, old, new, message):
    path = repo / "other.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert check(repo) == 1
    said = capsys.readouterr().out
    assert message in said


def test_scripts_may_each_have_their_own_main(repo):
    for name in ("owner", "other"):
        path = repo / f"{name}.py"
        path.write_text(path.read_text() + "\n\ndef main():\n    return 0\n")
    assert check(repo) == 0


def test_no_definition_is_overlooked():
    import ast

    for path in ROOT.glob("*.py"):
        expected = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                expected.add(node.name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                expected.add(node.targets[0].id)
            elif isinstance(node, ast.AnnAssign):
                expected.add(node.target.id)
        assert set(check_copies.definitions(path.read_bytes())) >= expected, path.name
