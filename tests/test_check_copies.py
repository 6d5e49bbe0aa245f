"""tools/check_copies.py on small mock repositories: every code, every repair, and the real repository."""

import hashlib
import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "check_copies.py"

spec = importlib.util.spec_from_file_location("check_copies", TOOL)
check_copies = importlib.util.module_from_spec(spec)
sys.modules["check_copies"] = check_copies  # dataclasses look their module up there
spec.loader.exec_module(check_copies)

NORM = """\
@register
class Norm(nn.Module):
    \"\"\"Divide by the root mean square.\"\"\"

    def forward(self, x):
        scale = x.pow(2).mean(-1, keepdim=True)  # [B, T, 1]
        return x * (scale + EPS).rsqrt()  # [B, T, D]
"""
HEAD = "from torch import nn\nfrom hub import register\n\n"
EPS = "EPS = 1e-6\n"
COPY_EPS = "# Copied from: janus_adaptive.py::EPS\n" + EPS
COPY = "# Copied from: janus_adaptive.py::Norm\n"
OWNER = HEAD + EPS + "\n\n" + NORM
TAIL = "\n\ndef main():\n    return 0\n"


def sha(text: str) -> str:
    """The hash that DESIGN asks of a variant: of the owner's text, without the marker and the last line feed."""
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()[:8]


class Repo:
    """A folder of scripts, and what the checker says about it."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture) -> None:
        self.root, self.capsys, self.err = root, capsys, ""

    def write(self, **files: str) -> None:
        """Write scripts, e.g. `train_sae="X = 1\\n"`."""
        for name, text in files.items():
            (self.root / f"{name}.py").write_bytes(text.encode())

    def read(self, name: str) -> str:
        return (self.root / f"{name}.py").read_bytes().decode()

    def git(self, *args: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *args], cwd=self.root, check=True, capture_output=True)

    def commit(self) -> None:
        self.git("init", "-q")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "state")

    def run(self, *args: str) -> tuple[int, str]:
        """Exit status and standard output; standard error goes to `self.err`."""
        try:
            status = check_copies.main(["--root", str(self.root), *args])
        except SystemExit as stop:
            status = stop.code
        out, self.err = self.capsys.readouterr()
        return status, out

    def codes(self, *args: str) -> list[str]:
        """`file:line CODE` of every problem."""
        status, out = self.run(*args)
        found = [" ".join(found) for found in re.findall(r"^([\w.]+:\d+): (C\d{3}) \S", out, re.MULTILINE)]
        if status == 0:
            assert "all in step" in out
            return []
        assert status == 1 and found
        return found


@pytest.fixture
def repo(tmp_path, capsys, monkeypatch) -> Repo:
    """An empty mock repository; git variables of an outer hook must not reach it."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return Repo(tmp_path, capsys)


# ---- Each code -------------------------------------------------------------------------------------------------------


def test_repository_in_step(repo):
    """Copies, a variant, a local name and the exempt names pass, with a one-line summary."""
    each = "SCRIPT = 'x'\n__all__ = []\n\n\ndef parse_args(argv):\n    return argv\n\n\ndef check_args(p, a):\n    p(a)\n"
    variant = f"# Variant of: janus_adaptive.py::_seed @{sha('_seed = 0')} -- another stream\n_seed = 1\n"
    local = "# Local: the unit of this file's CSV\nUNITS = {'b': 1}\n"
    repo.write(
        janus_adaptive=OWNER + "_seed = 0\nUNITS = {'a': 1}\n" + each + TAIL,
        train_sae=HEAD + COPY_EPS + "\n\n" + COPY + NORM + variant + local + each.replace("'x'", "'y'") + TAIL,
    )
    assert repo.run() == (0, "2 scripts, 2 copies, 1 variants: all in step\n")


def test_c000_syntax_error(repo):
    """One clear line for the script, and none for the copies that cannot be compared with it."""
    repo.write(janus_adaptive="X = 1\ndef f(:\n", train_sae="# Copied from: janus_adaptive.py::X\nX = 1\n")
    status, out = repo.run()
    assert status == 1
    assert out == "janus_adaptive.py:2: C000 cannot be read: invalid syntax\n"


@pytest.mark.parametrize("raw", [b"X = '\xe9'\n", b"X = 1\0\n"])
def test_c000_undecodable(repo, raw):
    """Latin-1 and binary files are a problem line, not a traceback."""
    repo.write(janus_adaptive=OWNER)
    (repo.root / "train_sae.py").write_bytes(raw)
    assert repo.codes() == ["train_sae.py:1 C000"]


@pytest.mark.parametrize(
    "marker",
    [
        "# copied from: janus_adaptive.py::X",
        "#Copied from: janus_adaptive.py::X",
        "# Copied from janus_adaptive.py::X",
        "# Copied from: janus_adaptive.X",
        "# Copied from: janus_adaptive.py::X with a -> b",
        "# Copied form: janus_adaptive.py::X",
        "# Copy of janus_adaptive.py::X",
        "# Variant of: janus_adaptive.py::X -- no hash",
        "# Variant of: janus_adaptive.py::X @0123456 -- short hash",
        "# Variant of: janus_adaptive.py::X @01234567",
        "# variant of X in the first phase",
        "# Varient of: janus_adaptive.py::X @01234567 -- misspelt",
        "# Local:",
        "# local: lower case",
    ],
)
def test_c001_malformed_marker(repo, marker):
    """A near miss is reported, once: it must not pass for a comment."""
    repo.write(janus_adaptive="X = 1\n", train_sae=f"{marker}\nX = 1\n")
    assert repo.codes() == ["train_sae.py:1 C001"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# Local: why\n\nX = 1\n", 1),  # a blank line between
        ("# Local: why\nimport os\n", 1),
        ("X = 1  # Local: why\n", 1),
        ("@d\n# Local: why\ndef f():\n    pass\n", 2),  # below the decorator
        ("def f():\n    # Local: why\n    x = 1\n", 2),
        ("def f():\n    pass\n    # Local: why\nX = 1\n", 3),  # belongs to the function above
        ("if TYPE_CHECKING:\n    # Local: why\n    X = 1\n", 2),
        ("# Local: why\nif __name__ == '__main__':\n    x = 1\n", 1),
        ("# Local: why\n# Local: twice\nX = 1\n", 2),
    ],
)
def test_c001_unattached_or_doubled_marker(repo, text, line):
    """A marker counts only once, and only directly above a top-level block."""
    repo.write(train_sae=text)
    assert repo.codes() == [f"train_sae.py:{line} C001"]


def test_markers_in_strings_and_prose_are_not_markers(repo):
    """Strings that show a marker, and comments that only mention copies, are left alone."""
    prose = "# Copies of the mask share storage, see model.py\n# A local variable; a variant\n# The copied rows\nY = 1\n"
    repo.write(train_sae="DOC = '''\n# Copied from: nowhere.py::X\n'''\n" + prose)
    assert repo.codes() == []


def test_marker_among_other_comments(repo):
    """A banner above the marker, and a comment below it, do not detach it."""
    repo.write(
        janus_adaptive="X = 1\n",
        train_sae="# ---- Model ----\n# Copied from: janus_adaptive.py::X\n# per head\nX = 2\n",
    )
    assert repo.codes() == ["train_sae.py:4 C003"]


def test_c002_source_missing(repo):
    """A file that is not there, a name that is not there, and a name that is only imported there."""
    repo.write(
        janus_adaptive="from torch import Z\n",
        train_sae="# Copied from: gone.py::X\nX = 1\n"
        "# Copied from: janus_adaptive.py::Y\nY = 1\n"
        "# Variant of: janus_adaptive.py::Z @01234567 -- why\nZ = 1\n",
    )
    assert repo.codes() == ["train_sae.py:2 C002", "train_sae.py:4 C002", "train_sae.py:6 C002"]


def test_c003_copy_differs_in_meaning(repo):
    """The line is the first that differs."""
    repo.write(janus_adaptive=OWNER, train_sae=HEAD + COPY_EPS + COPY + NORM.replace("pow(2)", "pow(3)"))
    assert repo.codes() == ["train_sae.py:12 C003"]
    assert "janus_adaptive.py::Norm in meaning" in repo.run()[1]


def test_c003_copy_that_stops_early(repo):
    """A copy without its last lines differs, although every line that it has is the owner's."""
    repo.write(janus_adaptive=OWNER, train_sae=HEAD + COPY_EPS + COPY + NORM[: NORM.rindex("        return")])
    assert repo.codes() == ["train_sae.py:13 C003"]


def test_c003_decorator_belongs_to_the_block(repo):
    """Dropping a decorator changes the meaning."""
    repo.write(janus_adaptive=OWNER, train_sae=HEAD + COPY_EPS + COPY + NORM.replace("@register\n", ""))
    assert repo.codes() == ["train_sae.py:7 C003"]


def test_c003_copy_under_another_name(repo):
    """A copy keeps its name, and --fix does not rename what the script calls it."""
    text = "# Copied from: janus_adaptive.py::X\nZ = 1\n"
    repo.write(janus_adaptive="X = 1\n", train_sae=text)
    status, out = repo.run("--fix")
    assert (status, out.count("\n")) == (1, 1)
    assert out.startswith("train_sae.py:2: C003 ") and "under another name" in out
    assert repo.read("train_sae") == text


def test_c004_copy_differs_in_comments_only(repo):
    """A wrong shape comment misleads although the code is the same."""
    repo.write(janus_adaptive=OWNER, train_sae=HEAD + COPY_EPS + COPY + NORM.replace("[B, T, D]", "[B, D]"))
    assert repo.codes() == ["train_sae.py:13 C004"]


def test_c005_copy_of_a_copy(repo):
    """The source has to be an owner: not a copy, not a variant, not the block itself."""
    repo.write(
        janus_adaptive="X = 1\n",
        harvest="# Copied from: janus_adaptive.py::X\nX = 1\n",
        train_sae="# Copied from: harvest.py::X\nX = 1\n",
        ablation="# Copied from: ablation.py::Y\nY = 1\n",
        hero=f"# Variant of: train_sae.py::X @{sha('X = 1')} -- why\nX = 2\n",
        lens=f"# Variant of: janus_adaptive.py::X @{sha('X = 1')} -- why\nX = 3\n",
        zoo="# Copied from: lens.py::X\nX = 3\n",
    )
    assert repo.codes() == ["ablation.py:2 C005", "hero.py:2 C005", "train_sae.py:2 C005", "zoo.py:2 C005"]


def test_c006_owner_changed_since_the_variant(repo):
    """The hash covers comments and decorators; the message says how to acknowledge."""
    variant = f"# Variant of: janus_adaptive.py::Norm @{sha(NORM)} -- no gain\n"
    changed = NORM.replace("[B, T, D]", "[B, D]")
    repo.write(janus_adaptive=OWNER, train_sae=variant + "class Norm:\n    pass\n")
    assert repo.codes() == []
    repo.write(janus_adaptive=OWNER.replace(NORM, changed))
    assert repo.codes() == ["train_sae.py:2 C006"]
    assert f"@{sha(changed)}" in repo.run()[1]


@pytest.mark.parametrize("block", ["def _load(p):\n    return p\n", "class _Box:\n    pass\n", "_UNITS = {'a': 1}\n", "_N: int = 1\n"])
def test_c007_same_name_unmarked(repo, block):
    """Private names and constants count; the main owner keeps the name, wherever it sorts."""
    repo.write(janus_adaptive=block, ablation=block)
    assert repo.codes() == ["ablation.py:1 C007"]


def test_c007_marked_source_is_the_owner(repo):
    """What a marker points at owns the name, even against the main owner."""
    repo.write(janus_adaptive="X = 2\n", train_sae="X = 1\n", zoo="# Copied from: train_sae.py::X\nX = 1\n")
    assert repo.codes() == ["janus_adaptive.py:1 C007"]


def test_c007_tuples_and_conditional_blocks(repo):
    """Names bound by tuples, chains and `if` count; bare annotations, loops inside and guards do not."""
    text = "A, (B, *C) = 1, (2, 3)\nD = E = 4\nif A:\n    F = 5\nG: int\nH.x = H['y'] = [i for i in A]\n"
    repo.write(a=text, b=text + "if __name__ == '__main__':\n    args = 1\n", c="if __name__ == '__main__':\n    args = 1\n")
    status, out = repo.run()
    assert status == 1
    assert [line.split()[2] for line in out.splitlines()] == ["A", "B", "C", "D", "E", "F"]


def test_names_that_are_imported_are_not_blocks(repo):
    """Re-exports, extending scripts, and imports that are conditional or have a fallback."""
    energy = "class Analyzer:\n    pass\n\n\nclass Config:\n    pass\n"
    optional = "try:\n    import tqdm\nexcept ImportError:\n    tqdm = None\n"
    typing = "if TYPE_CHECKING:\n    from torch import Tensor\n"
    repo.write(
        energy_lens_minimal=energy + optional + typing,
        energy_lens="from energy_lens_minimal import Analyzer, Config\n\n__all__ = ['Analyzer', 'Config']\n",
        real_model_extension="from energy_lens_minimal import Analyzer, Config as Base\n" + optional + typing,
    )
    assert repo.codes() == []


def test_two_statements_on_a_line_are_one_block(repo):
    """Lines are what is copied, so the marker covers both, and --fix writes the line once."""
    repo.write(janus_adaptive="A = 1; B = 2\n", train_sae="# Copied from: janus_adaptive.py::B\nA = 1; B = 3\n")
    assert repo.codes() == ["train_sae.py:2 C003"]
    assert repo.run("--fix")[0] == 0
    assert repo.read("train_sae").endswith("::B\nA = 1; B = 2\n")


USE = "def decay(x):\n    return scale(x) * BASE\n"
COPY_USE = "# Copied from: janus_adaptive.py::decay\n" + USE


@pytest.mark.parametrize(
    "around",
    [
        "from numpy import scale\n# Local: another base\nBASE = 2\n",  # another constant
        "from torch import scale\n# Copied from: janus_adaptive.py::BASE\nBASE = 1\n",  # another import
        "from numpy import scale\n",  # nothing at all
    ],
)
def test_c008_free_name_means_something_else(repo, around):
    """The same text with other surroundings computes something else."""
    repo.write(janus_adaptive="from numpy import scale\nBASE = 1\n" + USE, train_sae=around + COPY_USE)
    assert [problem.split()[1] for problem in repo.codes()] == ["C008"]


def test_c008_shadowed_builtin(repo):
    """A builtin in one script and a constant in the other are two things."""
    owner = "def widest(rows):\n    return max(rows)\n"
    repo.write(janus_adaptive=owner, train_sae="max = min\n# Copied from: janus_adaptive.py::widest\n" + owner)
    assert repo.codes() == ["train_sae.py:3 C008"]


def test_c008_same_thing_by_other_routes(repo):
    """Copies of one owner, another spelling of an import, a reviewed variant, local names: no problem."""
    norm = "def norm(x):\n    os = {k: nn.relu(k) for k in x}\n    return os, BASE, tools(SCRIPT), __doc__\n"
    marked = "# Copied from: janus_adaptive.py::norm\n" + norm
    tools = "def tools(s):\n    return s\n"
    repo.write(
        janus_adaptive="import torch.nn as nn\nSCRIPT = 1\nBASE = 1\n" + tools + norm,
        harvest="from torch import nn\nSCRIPT = 2\n# Copied from: janus_adaptive.py::BASE\nBASE = 1\n"
        "# Copied from: janus_adaptive.py::tools\n" + tools + marked,
        train_sae="from torch import nn\nfrom harvest import BASE\nimport os\n"
        f"# Variant of: janus_adaptive.py::tools @{sha(tools)} -- says more\ndef tools(s):\n    return s, s\n" + marked,
    )
    assert repo.codes() == []


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("# Copied from: janus_adaptive.py::BASE\nBASE = 2\n", "train_sae.py:3 C003"),  # its own C003 says it
        ("# per cent\nBASE = 1\n", "train_sae.py:3 C007"),  # the value is the same
    ],
)
def test_c008_does_not_repeat_another_problem(repo, base, problem):
    """One cause, one line."""
    here = "from numpy import scale\n" + base + COPY_USE
    repo.write(janus_adaptive="from numpy import scale\nBASE = 1\n" + USE, train_sae=here)
    assert repo.codes() == [problem]


HELPER = '''\
def entropy(p):
    """Shannon entropy in nats."""
    p = p / p.sum()
    q = p[p > 0]
    return -(q * q.log()).sum() if len(q) else entropy(p)
'''
RENAMED = HELPER.replace("entropy", "disorder").replace("Shannon entropy", "The same")


def test_c009_same_code_under_another_name(repo):
    """Across scripts, whatever the docstring and the recursive call are named."""
    repo.write(janus_adaptive=HELPER, train_sae="X = 1\n" + RENAMED)
    assert repo.codes() == ["train_sae.py:2 C009"]


def test_c009_twice_in_one_script(repo):
    """The same helper written twice inside one script."""
    repo.write(train_sae=HELPER + "\n\n" + RENAMED)
    assert repo.codes() == ["train_sae.py:8 C009"]


def test_c009_leaves_trivial_and_marked_code_alone(repo):
    """One-liners coincide by chance; a marker says that somebody has looked."""
    repo.write(
        janus_adaptive=HELPER + "def twice(x):\n    return 2 * x\n",
        train_sae="# Local: kept apart on purpose\n" + RENAMED + "def double(x):\n    return 2 * x\n",
    )
    assert repo.codes() == []


# ---- Repairs ---------------------------------------------------------------------------------------------------------

STALE = NORM.replace("[B, T, D]", "[B, D]")


def test_fix_pushes_owner_to_copies(repo):
    """Several copies of other lengths in one script, the diff on standard output, the rest of the file untouched."""
    long = "def long(x):\n    y = x\n    return y\n"
    repo.write(
        janus_adaptive=OWNER + long,
        train_sae=HEAD + "# Copied from: janus_adaptive.py::long\ndef long(x):\n    return x\n" + COPY + STALE + COPY_EPS + TAIL,
        harvest=HEAD + "# Copied from: janus_adaptive.py::EPS\nEPS = 2\n",
    )
    status, out = repo.run("--fix")
    assert status == 0
    wanted = HEAD + "# Copied from: janus_adaptive.py::long\n" + long + COPY + NORM + COPY_EPS + TAIL
    assert repo.read("train_sae") == wanted
    assert repo.read("harvest") == HEAD + COPY_EPS
    assert "--- a/train_sae.py" in out and "+        return x * (scale + EPS).rsqrt()  # [B, T, D]" in out
    assert "--- a/harvest.py" in out and "-EPS = 2" in out


def test_fix_pushes_when_only_the_owner_changed(repo):
    """The everyday case: the owner was edited since HEAD."""
    repo.write(janus_adaptive="X = 1\n", train_sae="# Copied from: janus_adaptive.py::X\nX = 1\n")
    repo.commit()
    repo.write(janus_adaptive="X = 2\n")
    assert repo.run("--fix")[0] == 0
    assert repo.read("train_sae").endswith("\nX = 2\n")


def test_fix_refuses_to_undo_an_edit_in_a_copy(repo):
    """The copy changed since HEAD and its owner did not: the edit stays, the other copies are still fixed."""
    copies = "# Copied from: janus_adaptive.py::X\nX = {}\n\n# Copied from: janus_adaptive.py::Y\nY = {}\n"
    repo.write(janus_adaptive="X = 1\n\nY = 1\n", train_sae=copies.format(1, 1))
    repo.commit()
    repo.write(janus_adaptive="X = 1\n\nY = 2\n", train_sae=copies.format(3, 1))
    assert repo.codes("--fix") == ["train_sae.py:2 C003"]
    assert "refused train_sae.py::X" in repo.err and "--adopt train_sae.py::X" in repo.err
    assert repo.read("train_sae") == copies.format(3, 2)


def test_fix_pushes_when_both_changed_and_when_drift_is_committed(repo):
    """The owner wins unless only the copy was edited: a copy that was stale at HEAD already is no edit."""
    copies = "# Copied from: janus_adaptive.py::X\nX = {}\n\n# Copied from: janus_adaptive.py::Y\nY = {}\n"
    repo.write(janus_adaptive="X = 1\n\nY = 1\n", train_sae=copies.format(1, 9))
    repo.commit()
    repo.write(janus_adaptive="X = 2\n\nY = 1\n", train_sae=copies.format(3, 9))
    assert repo.run("--fix")[0] == 0
    assert repo.read("train_sae") == copies.format(2, 1)


def test_fix_fills_in_a_copy_that_is_new_since_head(repo):
    """A marker above a stub is the way to paste a block; without a text at HEAD there is no edit to lose."""
    repo.write(janus_adaptive="X = 1\n")
    repo.commit()
    repo.write(train_sae="# Copied from: janus_adaptive.py::X\nX = ...\n")
    assert repo.run("--fix")[0] == 0
    assert repo.read("train_sae").endswith("\nX = 1\n")


def test_fix_only_the_scripts_that_are_named(repo):
    """SCRIPT arguments limit the report and the writing."""
    copy = "# Copied from: janus_adaptive.py::X\nX = 2\n"
    repo.write(janus_adaptive="X = 1\n", a=copy, b=copy)
    assert repo.codes("a.py") == ["a.py:2 C003"]
    assert repo.run("--fix", "a.py")[0] == 0
    assert repo.read("b") == copy


def test_adopt_takes_a_copy_into_the_owner_and_everywhere(repo):
    """Also into a copy that --fix would refuse to touch; other stale copies are left for --fix."""
    other = "# Copied from: janus_adaptive.py::EPS\nEPS = 5\n"
    better = NORM.replace("    def", "    # in float32\n    def")
    repo.write(janus_adaptive=OWNER, train_sae=HEAD + COPY_EPS + COPY + NORM, ablation=HEAD + COPY_EPS + COPY + NORM)
    repo.commit()
    repo.write(train_sae=HEAD + COPY_EPS + COPY + better, ablation=HEAD + other + COPY + STALE)
    status, out = repo.run("--adopt", "train_sae.py::Norm")
    assert status == 1 and "ablation.py:5: C003 EPS" in out
    assert "+++ b/janus_adaptive.py" in out and "+++ b/ablation.py" in out
    assert repo.read("janus_adaptive") == OWNER.replace(NORM, better)
    assert repo.read("ablation") == HEAD + other + COPY + better


def test_adopt_leaves_copies_of_another_owner_alone(repo):
    """Two owners of one name, one of them marked Local."""
    copy = "# Copied from: {}.py::X\nX = {}\n"
    repo.write(janus_adaptive="X = 1\n", a=copy.format("janus_adaptive", 2), b="# Local: why\nX = 5\n", c=copy.format("b", 5))
    assert repo.run("--adopt", "a.py::X")[0] == 0
    assert repo.read("janus_adaptive") == "X = 2\n"
    assert repo.read("c") == copy.format("b", 5)


def test_ack_refreshes_the_hash_of_a_variant(repo):
    """Only the hash in the marker changes, and the check passes."""
    marker = "# Variant of: janus_adaptive.py::X @{} -- was @00000000 -- before\n"
    repo.write(janus_adaptive="X = 1  # new\n", train_sae=marker.format("00000000") + "X = 2\n")
    assert repo.codes() == ["train_sae.py:2 C006"]
    assert repo.run("--ack", "train_sae.py::X")[0] == 0
    assert repo.read("train_sae") == marker.format(sha("X = 1  # new")) + "X = 2\n"


@pytest.mark.parametrize("flag", ["--adopt", "--ack"])
@pytest.mark.parametrize(
    "argument",
    ["", "train_sae.py", "train_sae.py::", "gone.py::X", "broken.py::X", "train_sae.py::Gone", "janus_adaptive.py::X"]
    + ["train_sae.py::X", "train_sae.py::Lost", "train_sae.py::Chain"],
)
def test_bad_adopt_and_ack_arguments(repo, flag, argument):
    """One line on standard error, exit 2, nothing written."""
    other, this = ("Variant of", "Copied from") if flag == "--adopt" else ("Copied from", "Variant of")
    tail = {"Copied from": "", "Variant of": " @00000000 -- why"}
    text = f"# {other}: janus_adaptive.py::X{tail[other]}\nX = 2\n# {this}: gone.py::Lost{tail[this]}\nLost = 1\n"
    text += f"# {this}: train_sae.py::X{tail[this]}\nChain = 1\n"
    repo.write(janus_adaptive="X = 1\n", train_sae=text, broken="def\n")
    status, out = repo.run(flag, argument)
    assert (status, out, repo.err.count("\n")) == (2, "", 1)
    assert repo.err.startswith("check_copies: ")
    assert repo.read("train_sae") == text


def test_adopt_needs_a_copy_that_kept_its_name(repo):
    """A copy under another name would rename the block in its owner."""
    repo.write(janus_adaptive="X = 1\n", train_sae="# Copied from: janus_adaptive.py::X\nZ = 2\n")
    assert repo.run("--adopt", "train_sae.py::Z")[0] == 2
    assert repo.read("janus_adaptive") == "X = 1\n"


def test_other_bad_arguments(repo):
    """A root without scripts must not pass, nor a script that is not there, nor two repairs at once."""
    assert repo.run()[0] == 2
    assert "no *.py scripts" in repo.err
    repo.write(a="X = 1\n")
    assert repo.run("gone.py")[0] == 2
    assert repo.run("--fix", "--ack", "a.py::X")[0] == 2


def test_writes_keep_line_ends_mode_and_leave_no_temporary_file(repo):
    """CRLF, form feeds, a missing last line feed and the executable bit survive a repair."""
    repo.write(janus_adaptive="X = 1\n", train_sae="PAGE = 1\r\n\f\r\n# Copied from: janus_adaptive.py::X\r\nX = 2\r\nY = 3")
    (repo.root / "train_sae.py").chmod(0o755)
    assert repo.run("--fix")[0] == 0
    assert repo.read("train_sae") == "PAGE = 1\r\n\f\r\n# Copied from: janus_adaptive.py::X\r\nX = 1\r\nY = 3"
    assert stat.S_IMODE((repo.root / "train_sae.py").stat().st_mode) == 0o755
    assert sorted(path.name for path in repo.root.iterdir()) == ["janus_adaptive.py", "train_sae.py"]


def test_interrupted_write_leaves_the_script_whole(repo, monkeypatch):
    """The script is replaced in one step, or not at all."""
    copy = "# Copied from: janus_adaptive.py::X\nX = 2\n"
    repo.write(janus_adaptive="X = 1\n", train_sae=copy)

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(check_copies.os, "replace", full_disk)
    assert repo.run("--fix")[0] == 2
    assert repo.err == "check_copies: cannot write train_sae.py, which is as it was: no space left\n"
    assert repo.read("train_sae") == copy
    assert not list(repo.root.glob("*.tmp"))


# ---- The real thing --------------------------------------------------------------------------------------------------


def test_only_top_level_scripts_are_read(repo):
    """Not folders, not what an editor keeps in hidden files, not the tools and tests."""
    repo.write(**{"a": "X = 1\n", ".a": "X = 1\n"})
    (repo.root / "folder.py").mkdir()
    (repo.root / "folder.py" / "b.py").write_text("X = 1\n")
    assert repo.run() == (0, "1 scripts, 0 copies, 0 variants: all in step\n")


def test_command_line(repo):
    """As CI runs it: problems on standard output, exit status 1."""
    repo.write(janus_adaptive="X = 1\n", train_sae="X = 1\n")
    command = [sys.executable, str(TOOL), "--root", str(repo.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = "X is also at janus_adaptive.py:1; mark it Copied from, Variant of or Local"
    assert (done.returncode, done.stdout, done.stderr) == (1, f"train_sae.py:1: C007 {text}\n", "")


@pytest.mark.skipif(not list(ROOT.glob("*.py")), reason="no top-level scripts yet")
def test_this_repository_is_in_step(capsys):
    """The scripts next to this test folder."""
    status = check_copies.main([])
    assert status == 0, capsys.readouterr().out
