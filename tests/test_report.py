"""The walk-through of README's "Try a variant", as a reader does it: make, one edit, make, two runs in one page, a browser."""

import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import headlines  # noqa: E402
import report  # noqa: E402

PARTS = "train harvest sae ablate hero figures"
OLD = "return cosines.square().mean(-1)"
NEW = "return cosines.pow(4).mean(-1)"  # the variant: hardly any but the most similar pairs are pressed


def make(project: Path, run: str, targets: str, *flags: str) -> str:
    """make in the copy, with this Python, on the small text; returns what it printed."""
    data = f"--dataset {project / 'text.txt'} --tokenizer train:512"
    train = f"--preset smoke --steps 12 --save_interval 6 --control_interval 1 --target_sigma 0.009 {data}"
    variables = [
        f"RUN=runs/{run}",
        "LAYERS=0 1",
        f"PY={sys.executable}",
        f"TRAIN={train}",
        "TEXT=the import statement",
    ]
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", ".venv/.ready", *flags, *targets.split(), *variables],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def scripts(printed: str) -> set[str]:
    """The scripts that a dry run of make would start, the redrawing of figures aside."""
    return set(re.findall(r"(\w+)\.py (?!--redraw)\S", printed))


@pytest.fixture(scope="module")
def project(tmp_path_factory, text_file, cache_dir) -> Path:
    """A copy of the repository with a finished small run, runs/base."""
    folder = tmp_path_factory.mktemp("project")
    for path in [*ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "requirements.txt"]:
        shutil.copy2(path, folder)
    for name in ("tools", "pages"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(text_file, folder / "text.txt")
    make(folder, "base", PARTS)
    return folder


@pytest.fixture(scope="module")
def edited(project) -> Path:
    """The same after the edit of the walk-through, and with the run of the variant beside it."""
    script = project / "janus_adaptive.py"
    text = script.read_text()
    method = text[text.index("method: edit here") : text.index("-- run\n")]
    assert text.count(OLD) == 1 and OLD in method, "the walk-through edits the marked section"
    script.write_text(text.replace(OLD, NEW))
    assert scripts(make(project, "base", PARTS, "-n")) == set(), (
        "an edit of phase 1 must not retrain a finished run, nor what follows"
    )
    todo = scripts(make(project, "mine", PARTS, "-n"))
    assert todo == {
        "janus_adaptive",
        "harvest_activations",
        "train_sae",
        "ablation_test",
        "hero_head_analysis",
    }
    make(project, "mine", PARTS)
    make(project, "mine", "report", "RUNS=runs/base runs/mine")
    return project


def test_the_edit_acts_on_the_adaptive_arm_alone(edited):
    loss = {
        (run, arm): pd.read_csv(edited / "runs" / run / arm / "telemetry.csv").loss
        for run in ("base", "mine")
        for arm in report.ARMS
    }
    assert loss["base", "control"].equals(loss["mine", "control"]) and not loss[
        "base", "adaptive"
    ].equals(loss["mine", "adaptive"])


@pytest.mark.parametrize(
    "script, remade",
    [
        ("hero_head_analysis.py", {"hero_head_analysis"}),
        ("ablation_test.py", {"ablation_test", "hero_head_analysis"}),
        ("train_sae.py", {"train_sae", "hero_head_analysis"}),
        ("harvest_activations.py", {"harvest_activations", "train_sae", "hero_head_analysis"}),
    ],
)
def test_an_edited_phase_remakes_what_depends_on_it(script, remade, project):
    assert scripts(make(project, "base", PARTS, "-n", "-W", script)) == remade


def test_two_runs_stand_side_by_side_with_their_own_numbers(edited):
    page = (edited / "results" / "report.html").read_text()
    for run in ("base", "mine"):
        t = pd.read_csv(edited / "runs" / run / "results_ablation.csv").query(
            "mode == 'mean' and run == 'adaptive'"
        )
        x = t.sort_values("delta").iloc[-1]
        # Two dozen windows of few documents: no interval
        assert pd.isna(x.ci_lo)
        cell = f"{run}, adaptive, mean: L{x.layer}H{x['head']} {x.delta:+.4f} nats, rank 1"
        assert cell in page
        assert f"{run}: The control loop" in page
    assert page.count("not there (") == 2, "Energy-Lens was not run, in either"
    assert "make energy RUN=runs/mine" in page


def test_verdicts_follow_the_tables(edited, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(edited / "runs" / "base", run)
    summary = run / "results_ablation_summary.csv"
    claim = "The adaptive model has a Hero Head"
    said = {c: (v, evidence) for c, v, evidence in report.verdict(report.Run(run))}
    assert said[claim][0] == "not told" and "documents are too few" in said[claim][1]
    measured = dict.fromkeys(["crossfit", "crossfit_lo", "crossfit_hi"], 0.02)
    measured |= dict.fromkeys(["gap_lo", "gap_hi", "p_top1"], 0.97)
    for unique, word in ((True, "supported"), (False, "not supported")):
        table = pd.read_csv(summary).assign(unique_hero=unique, **measured)
        table.to_csv(summary, index=False)
        said = {claim: (v, evidence) for claim, v, evidence in report.verdict(report.Run(run))}
        assert said[claim][0] == word and "in front in 97% of resamples" in said[claim][1]
    path = run / "hero_analysis" / "hero_preserving.csv"
    for low, said in ((-0.1, "shares of it mean nothing"), (0.1, "Keeping only")):
        pd.read_csv(path).assign(impact=0.2, impact_low=low, impact_high=0.3).to_csv(
            path, index=False
        )
        assert said in report.hero(report.Run(run))[-1].reading
    path = run / "adaptive" / "telemetry.csv"
    telemetry = pd.read_csv(path)
    telemetry["sigma_filtered"], telemetry["phase"] = 0.009 * 1.2, "auto"
    telemetry.to_csv(path, index=False)
    claim, said, _ = report.verdict(report.Run(run))[0]
    assert "holds sigma" in claim and said == "not supported"


def test_tracking_of_known_loops():
    """Settles at the second closed-loop sample; then three of four within 10 %. And one that never does."""
    phase = ["warmup"] * 2 + ["auto"] * 5 + ["hold"]
    t = pd.DataFrame(
        dict(
            step=range(0, 80, 10),
            phase=phase,
            sigma_filtered=[9, 9, 1.5, 1.05, 0.95, 1.2, 1.0, 0.5],
            sigma_z=[9, 9, 1.5, 1.2, 0.8, 1.2, 1.0, 0.5],
            sigma_resid=math.nan,
        )
    )
    held = report.tracking(t, 1.0, 0.0)
    assert (held.settled_step, held.n, held.share, held.raw_share) == (30, 4, 0.75, 0.25)
    assert held.hold_mean == 0.5 and held.mean == pytest.approx(1.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        never = report.tracking(t.assign(sigma_filtered=2.0), 1.0, 0.0)
    assert never.n == 0 and never.share == 0 and never.mean != never.mean
    # A setpoint that moved: each sample against its own
    moved = t.assign(setpoint=[1, 1, 1, 1, 1, 2, 2, 2], sigma_filtered=[9, 9, 9, 1, 1, 2, 2, 2])
    assert report.tracking(moved, 1.0, 0.0).share == 1


def test_share_of_noise_is_what_a_simulation_finds():
    """White noise of 20 % through the first-order filter, against the closed form on 200 of its samples."""
    rng = np.random.default_rng(0)
    noise = 0.2 * rng.standard_normal(200_000)
    filtered, level = [], 0.0
    for value in noise:
        level = 0.8 * level + 0.2 * value
        filtered.append(level)
    simulated = (np.abs(np.exp(filtered) - 1) <= 0.1).mean()
    found = [headlines.share_of_noise(pd.Series(np.exp(noise[i : i + 200])), 0.8) for i in range(0, 20_000, 200)]  # fmt: skip
    assert np.mean(found) == pytest.approx(simulated, abs=0.01)
    # A slow change under the noise does not count as noise
    drifting = np.exp(noise[:200] + np.linspace(0, 1, 200))
    assert headlines.share_of_noise(pd.Series(drifting), 0.8) == pytest.approx(found[0], abs=0.01)


@pytest.mark.parametrize(
    "given, says", [("nothing", "has no adaptive/telemetry.csv"), ("full", "Is a directory")]
)
def test_wrong_inputs_are_one_line(given, says, project, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    runs = project / "runs" / "base" if given == "full" else tmp_path / given
    out = tmp_path / "out"
    out.mkdir()
    assert report.main(["--runs", str(runs), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not list(out.iterdir())


def test_a_script_copied_alone_writes_all_but_its_page(project, tmp_path):
    """Markdown, CSVs and figures are those of the script that has its folder pages/."""
    shutil.copy(ROOT / "hero_head_analysis.py", tmp_path)
    text = ["--text", "the import statement", "--save_dir", str(tmp_path / "out")]
    inputs = ["--ablation_csv", "runs/base/results_ablation.csv", "--saes_dir", "runs/base/saes"]
    inputs += ["--activations_dir", "runs/base/activations"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "hero_head_analysis.py"), *inputs, *text],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "pages/" in line]
    assert len(said) == 1 and "needs the folder pages/ beside hero_head_analysis.py" in said[0]
    assert done.stdout.rstrip().endswith(f"Read {tmp_path / 'out' / 'hero_report.md'}")
    before, after = project / "runs" / "base" / "hero_analysis", tmp_path / "out"
    names = {path.name for path in before.iterdir()}
    assert names - {path.name for path in after.iterdir()} == {
        "hero_report.html",
        "hero_report.html.json",
    }
    for path in before.glob("*.*"):
        if path.suffix in (".md", ".csv", ".png"):
            assert path.read_bytes() == (after / path.name).read_bytes(), path.name


# ------------------------------------------------------------------------------------------------------ in a browser
HOSTILE = [
    "<script>window.hacked=1</script>",
    "</td></table><img src=x onerror=window.hacked=1>",
    '"><b>',
    "&lt;i&gt;",
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=quiet)
        yield b
        b.close()


@pytest.fixture(scope="module")
def hostile(edited) -> Path:
    """The page of both runs, with markup as token text in one of them."""
    tokens = edited / "runs" / "mine" / "hero_analysis" / "hero_tokens.csv"
    table = pd.read_csv(tokens).head(len(HOSTILE))
    table.assign(context=HOSTILE[: len(table)], next=HOSTILE[: len(table)]).to_csv(
        tokens, index=False
    )
    make(edited, "mine", "report", "RUNS=runs/base runs/mine")
    return edited / "results" / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(width, scheme, browser, hostile):
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on(
        "request",
        lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:")) else None,
    )
    page.goto(hostile.as_uri())
    assert hostile.stat().st_size <= report.MAX_BYTES
    pictures = page.evaluate(
        "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().then(() => i.naturalWidth))))"
    )
    assert len(pictures) == 2 * 9 and min(pictures) > 300, "nine figures a run without Energy-Lens"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, (
        "the page is wider than the screen"
    )
    # hover, toggles, keyboard
    cell = page.locator(".heat:not([hidden]) td").first
    cell.hover()
    assert cell.get_attribute("data-tell") == page.locator(".tell").first.inner_text()
    visible = page.locator("#grid0 .heat:not([hidden]) caption").first
    before = visible.inner_text()
    page.locator("#grid0 button[data-show=zero]").press("Enter")
    assert (
        "mean" in before
        and "zero" in page.locator("#grid0 .heat:not([hidden]) caption").first.inner_text()
    )
    ground = "getComputedStyle(document.body).backgroundColor"
    was = page.evaluate(ground)
    page.keyboard.press("Home")
    page.locator("#theme").click()
    assert page.evaluate(ground) != was and (was == "rgb(255, 255, 255)") == (scheme == "light")
    page.locator("details summary").first.press("Enter")
    assert (
        page.locator("details[open] pre")
        .first.inner_text()
        .startswith("python janus_adaptive.py --redraw")
    )
    page.locator("nav a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash === '#verdict'")
    with page.expect_download() as saved:
        page.locator("a[download='results_ablation.csv']").first.click()
    assert (
        Path(saved.value.path()).read_bytes()
        == (hostile.parents[1] / "runs" / "base" / "results_ablation.csv").read_bytes()
    )
    # what tokens say stays text
    assert page.evaluate("window.hacked") is None
    assert all(text in page.locator("body").inner_text() for text in HOSTILE)
    assert not said and not asked
    page.close()
