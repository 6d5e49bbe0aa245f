"""The walk-through of README's "Try a variant", as a reader does it: make, one edit, make, two runs in one page, a browser."""

import itertools
import json
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


def test_nulls_heads_and_the_model_before_training_stand_beside_the_saes(project):
    """Of LAYERS 0 1: nulls in the last, SAEs of heads in the first and the last."""
    saes = project / "runs" / "base" / "saes"
    nulls = pd.read_csv(saes / "sae_nulls.csv")
    found = {(row.run, row.null, row.layer) for row in nulls.itertuples()}
    of_arms = {(arm, null, 1) for arm in report.ARMS for null in ("gaussian", "decoder")}
    assert found == {*of_arms, ("untrained", "untrained", 1)}
    table = pd.read_csv(saes / "table2.csv")
    rows = {(row.run, row.unit, row.arch, row.layer) for row in table.itertuples()}
    assert rows == {
        (arm, *kind, layer)
        for arm in report.ARMS
        for kind, layer in itertools.product([("layer", "batchtopk"), ("head", "relu")], (0, 1))
    }
    gains = table[["gain_gaussian", "gain_decoder", "gain_untrained"]].notna()
    has_nulls = (table["unit"] == "layer") & (table["layer"] == 1)
    assert gains[has_nulls].all(axis=None) and not gains[~has_nulls].any(axis=None)
    # A record a command, for the times of phases
    for place in ("adaptive", "control", "untrained", "."):
        assert json.loads((saes / place / "run.json").read_text())["exit_status"] == 0


def test_a_run_of_before_has_no_model_before_training_and_make_goes_on(project):
    initial = project / "runs" / "base" / "control" / "janus_control_initial.pt.json"
    stamp = project / "runs" / "base" / "activations" / ".untrained"
    initial.rename(initial.with_suffix(".away"))
    stamp.unlink()
    try:
        printed = make(project, "base", "sae")
        assert "is not there: no SAEs of the model before training" in printed and stamp.exists()
    finally:
        initial.with_suffix(".away").rename(initial)


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
        assert f"{run}: Did it hold" in page
    assert page.count("not there (") == 2, "Energy-Lens was not run, in either"
    assert "make energy RUN=runs/mine" in page


def test_verdicts_follow_the_tables(edited, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(edited / "runs" / "base", run)
    summary = run / "results_ablation_summary.csv"
    claim = "One head of the adaptive model stands out (a Hero Head)"

    def judged():
        return {v.claim: v for v in report.verdict(report.Run(run))}

    assert judged()[claim].word == "cannot tell"
    assert "documents are too few" in judged()[claim].evidence
    measured = dict.fromkeys(["crossfit", "crossfit_lo", "crossfit_hi"], 0.02)
    measured |= dict.fromkeys(["gap_lo", "gap_hi", "p_top1"], 0.97)
    for unique, word in ((True, "supported"), (False, "cannot tell")):
        table = pd.read_csv(summary).assign(unique_hero=unique, **measured)
        table.to_csv(summary, index=False)
        assert judged()[claim].word == word
        assert "in front in 97% of resamples" in judged()[claim].evidence
    path = run / "hero_analysis" / "hero_preserving.csv"
    for low, said in ((-0.1, "shares of it mean nothing"), (0.1, "Attending to")):
        pd.read_csv(path).assign(impact=0.2, impact_low=low, impact_high=0.3).to_csv(
            path, index=False
        )
        assert said in report.hero(report.Run(run))[-1].reading
    path = run / "adaptive" / "telemetry.csv"
    telemetry = pd.read_csv(path)
    telemetry["sigma_filtered"], telemetry["phase"] = 0.009 * 1.2, "auto"
    telemetry.to_csv(path, index=False)
    first = report.verdict(report.Run(run))[0]
    assert "holds sigma" in first.claim and first.word == "not supported"


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
    record = (project / "runs" / "base" / "hero_analysis" / "run.json").read_text()
    inputs += ["--n_seqs", str(json.loads(record)["arguments"]["n_seqs"])]
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
def test_the_words_of_the_axes_of_every_head_are_whole(width, browser, project):
    page = browser.new_page(viewport=dict(width=width, height=900))
    page.goto((project / "runs" / "base" / "hero_analysis" / "hero_report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    words, clipped = page.evaluate(
        """() => {
            const texts = [...document.querySelectorAll("#heads text")];
            const isClipped = (text) => {
                const own = text.getBoundingClientRect();
                const all = text.ownerSVGElement.getBoundingClientRect();
                return own.left < all.left || own.right > all.right || own.bottom > all.bottom;
            };
            const say = (some) => some.map((text) => text.textContent);
            return [say(texts), say(texts.filter(isClipped))];
        }"""
    )
    assert "impact (millinats a token)" in words and clipped == []


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
    shown = len(pictures) + page.locator("figure .wide svg").count()
    assert shown == 2 * 6, "six figures a run without Energy-Lens"
    assert all(width > 300 for width in pictures)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, (
        "the page is wider than the screen"
    )
    clipped = page.evaluate(
        """() => [...document.querySelectorAll("svg.axis text")].filter(text => {
            const own = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
            return own.left < all.left - 1 || own.right > all.right + 1;
        }).map(text => text.textContent)"""
    )
    assert clipped == []
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
    command = page.locator("details[open] code").first.inner_text()
    assert command.startswith("python janus_adaptive.py --redraw")
    page.locator("nav a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash === '#control-loop'")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
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


# ----------------------------------------------------------------------- sentences, from small tables
def run_of(folder: Path, **tables: pd.DataFrame) -> report.Run:
    """A run with a minute's telemetry and these tables; their names have __ for /."""
    (folder / "adaptive").mkdir(parents=True, exist_ok=True)
    (folder / "adaptive" / "telemetry.csv").write_text("step\n")
    for name, table in tables.items():
        path = folder / f"{name.replace('__', '/')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False)
    return report.Run(folder)


def validation(loss: np.ndarray) -> pd.DataFrame:
    """Two windows a document."""
    windows = np.arange(len(loss))
    return pd.DataFrame(dict(window=windows, document=windows // 2, loss_nats=loss))


@pytest.mark.parametrize(
    "share, spread, n, word, lead",
    [
        (0.01, 0.001, 80, "supported", "below the limit"),
        (0.04, 0.001, 80, "not supported", "above the limit"),
        (0.019, 0.02, 80, "cannot tell", "may be below or above"),
        (0.0, 0.02, 80, "supported", "No cost of the pressure is told from zero"),
        (0.0101, 0.2, 80, "cannot tell", "No cost of the pressure is told from zero"),
        (-0.02, 0.001, 80, "supported", "lowered the loss"),
        (0.01, 0.001, 10, "cannot tell", "cannot tell"),
    ],
)
def test_the_price_is_judged_by_the_limits_of_its_interval(share, spread, n, word, lead, tmp_path):
    rng = np.random.default_rng(0)
    control = rng.normal(4.4, 0.3, n)
    noise = rng.normal(size=n)
    noise -= noise @ control / (control @ control) * control  # so that the price is `share`
    noise -= noise.mean()
    adaptive = control * (1 + share) + spread * noise * control.mean()
    run = run_of(
        tmp_path, adaptive__validation=validation(adaptive), control__validation=validation(control)
    )
    [found] = report.judge_price(run)
    assert found.word == word and (found.tone == "good") == (word == "supported")
    [sentence] = report.lead_price(run)
    assert lead in sentence
    # One interval, here and in the headlines
    assert run.price.interval in sentence and run.price.interval in found.evidence
    assert "whole validation split" in found.evidence


def layer_table(values: list[float], half: float) -> pd.DataFrame:
    rows = dict(layer=range(len(values)), metric="sigma_resid", value=values, n_blocks=20)
    table = pd.DataFrame(rows | dict(null_mean=0.01, n_windows=9, n_documents=9, n_tokens=9))
    return table.assign(ci_lo=table.value - half, ci_hi=table.value + half)


@pytest.mark.parametrize(
    "adaptive, half, word, says",
    [
        ([0.02] * 6, 0.001, "supported", "less alike in 6 of 6 layers, more alike in 0"),
        # Less alike on average, which is what was judged before, but not in two layers
        ([0.01] * 4 + [0.0637, 0.0872], 0.001, "in 4 of 6 layers", "more alike in 2"),
        ([0.08] * 6, 0.001, "not supported", "less alike in 0 of 6 layers, more alike in 6"),
        ([0.049] * 6, 0.01, "cannot tell", "cannot tell in 6"),
        ([0.02] * 6, math.nan, "cannot tell", "cannot tell in 6"),
    ],
)
def test_writes_are_judged_by_layer(adaptive, half, word, says, tmp_path):
    tables = {
        "activations__adaptive__topology_stats": layer_table(adaptive, half),
        "activations__control__topology_stats": layer_table([0.05] * 6, half),
    }
    run = run_of(tmp_path, **tables)
    [found] = report.judge_writes(run)
    assert found.word == word and says in found.evidence
    assert (found.tone == "good") == (word == "supported")
    assert says in report.lead_writes(run)[0]
    # The picture is of the quantity that the sentence is about
    [exhibit] = report.topology(run)
    assert says in exhibit.reading and "sigma_resid" in exhibit.drawing.unit
    assert not exhibit.image


def preserving(low: float, chance_high: float) -> pd.DataFrame:
    """The table that misled: the largest share is that of a reconstruction check."""
    rows = [
        ("all SAE features", "claimed", 1.0, 0.99, 1.01),
        ("keys: 0-5 tokens back", "claimed", 0.99, 0.97, 1.01),
        ("keys: 0-5 tokens back", "matched-random", 0.24, 0.1, chance_high),
        ("keys: induction", "claimed", 0.01, 0.0, 0.02),
    ]
    columns = ["mechanism", "kind", "value", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns).assign(impact_low=low, impact_high=0.1)


def test_only_kinds_of_keys_explain_a_head():
    told = report.share_explained(preserving(0.01, 0.4), "L3H1")
    kept = "Attending to “0-5 tokens back” alone keeps 99% [97%, 101%] of the loss impact of L3H1"
    assert told == f"{kept}; as many random keys 24% [10%, 40%]."
    told = report.share_explained(preserving(0.01, 0.98), "L3H1")
    assert told.endswith("It cannot be told from random keys.")
    for low in (-0.01, math.nan):
        assert "shares of it mean nothing" in report.share_explained(preserving(low, 0.4), "L3H1")


def scores(value: float, low: float, high: float, above: tuple[float, float]) -> pd.DataFrame:
    rows = [("hero", value, low, high, *above)]
    rows += [(f"random {i}", other, other, other, 0, 0) for i, other in enumerate((0.22, 0.29), 1)]
    columns = ["role", "value", "ci_low", "ci_high", "above_null_low", "above_null_high"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(score="previous token", null=0.534, unit="document")


@pytest.mark.parametrize(
    "row, says",
    [
        # The table that misled: as on shuffled text, yet twice the comparison heads
        (
            (0.53, 0.5, 0.56, (-0.02, 0.02)),
            "about the same on shuffled text (53 %): position, not content",
        ),
        # Told from 0, but a twenty-fifth of the score
        ((0.53, 0.5, 0.56, (0.01, 0.02)), "about the same on shuffled text (53 %)"),
        ((0.53, 0.5, 0.56, (0.2, 0.3)), "on shuffled text 53 %: content matters"),
        ((0.53, 0.5, 0.56, (-0.3, 0.3)), "on shuffled text 53 %, from which it cannot be told"),
        ((0.1, 0.05, 0.15, (math.nan, math.nan)), "not measured on shuffled text"),
    ],
)
def test_a_score_stands_beside_the_comparison_heads(row, says):
    told = report.scores_beside_others(scores(*row))
    assert told.startswith(f"Previous token {row[0]}, 2 comparison heads 0.22 to 0.29; ")
    assert says in told


def test_what_a_head_does_more_stands_before_what_it_hardly_does_at_all():
    """The table that misled: an induction score of 6e-5, a quarter of the others' least, was said
    of a head that gives half of its attention to the previous token."""
    more = scores(0.54, 0.51, 0.56, (-0.01, 0.01))
    none = scores(6e-5, 4e-5, 9e-5, (-0.01, 0.01)).assign(score="induction")
    none.loc[1:, ["value", "ci_low", "ci_high"]] /= 1000
    little = scores(0.02, 0.01, 0.03, (-0.01, 0.01)).assign(score="distance")
    told = report.scores_beside_others(pd.concat((none, little, more)))
    first, second = told.split(". ")
    assert first.startswith("Previous token 0.54") and second.startswith("Distance 0.02")


@pytest.mark.parametrize("ends", [(0.25, 0.6), (math.nan, math.nan)])
def test_a_score_whose_interval_holds_theirs_is_not_told_from_them(ends):
    told = report.scores_beside_others(scores(0.53, *ends, (0.1, 0.2)))
    assert told == "In none of its scores is it told from the comparison heads."


def test_an_older_file_has_no_score_on_shuffled_text():
    older = scores(0.53, 0.5, 0.56, (0, 0)).drop(columns="above_null_low")
    assert "not measured on shuffled text" in report.scores_beside_others(older)


def test_a_score_of_the_weights_needs_no_interval():
    table = scores(0.9, math.nan, math.nan, (math.nan, math.nan))
    told = report.scores_beside_others(table.assign(score="OV copying", unit="permutation"))
    assert told.startswith("OV copying 0.9, 2 comparison heads 0.22 to 0.29")


@pytest.mark.parametrize(
    "low, high, says",
    [
        (0.01, 0.03, "raises the loss by +0.0200 nats a token [+0.0100, +0.0300]"),
        (-0.01, 0.05, "These windows show no effect of L3H1"),
        (-0.03, -0.01, "lowers the loss"),
        (math.nan, math.nan, "no interval: 7 documents are too few"),
    ],
)
def test_what_a_head_costs_is_told_by_its_interval(low, high, says):
    row = pd.Series(dict(value=0.02, ci_low=low, ci_high=high, n=7))
    assert says in report.tell_impact(row, "L3H1")


def test_every_correlation_is_told_with_its_own_n_and_both_ends_of_the_doses():
    rows = [
        (0.05, "efas_a", 0.4, -0.47, 0.92),
        (0.25, "efas_a", 0.5, 0.1, 0.9),
        (1.0, "attribution_a", -0.43, -0.86, 0.26),
        (1.0, "efas_a", 0.70, 0.21, 0.92),
        (1.0, "attribution_a", -0.6, -0.86, -0.26),
    ]
    table = pd.DataFrame(rows, columns=["eps", "predictor", "spearman", "ci_lo", "ci_hi"])
    told = report.tell_doses(table)
    assert "when 5% of a feature is taken away: EFAS 0.40 [-0.47, 0.92], cannot tell from 0" in told
    assert "when 100% of a feature" in told and "25%" not in told
    assert "attribution -0.43 [-0.86, 0.26], cannot tell from 0" in told
    assert "EFAS 0.70 [0.21, 0.92], yes" in told and "the wrong way round" in told
    row = pd.Series(dict(n_features=13, n_clusters=11.0, n_seq=48))
    assert report.count_intervened(row) == "13 features, 11 clusters of features, 48 sequences"
    assert report.count_intervened(row[["n_features"]]) == "13 features"


def models(loss: float) -> pd.DataFrame:
    names = ["unigram", "Energy Transformer, 4 steps", "Energy Transformer, 20 steps"]
    return pd.DataFrame(dict(model=names, masked_nats=[5.02, loss, 9.0], n_masked=196))


def test_a_model_worse_than_a_unigram_cannot_tell_whether_features_are_aligned(tmp_path):
    layers = pd.DataFrame(
        dict(aligned=[3], eligible=[9], rule_passes=[5], rule_false_directions=[6])
    )
    words = {5.42: "cannot tell", 4.1: "supported", 5.02: "cannot tell"}
    for loss, word in words.items():
        run = run_of(tmp_path, energy_lens__layers=layers, energy_lens__models=models(loss))
        record = tmp_path / "energy_lens" / "run.json"
        record.write_text('{"arguments": {"preset": "full"}}')
        [found] = report.judge_alignment(run)
        assert found.word == word
        assert ("worse than one that knows only frequencies" in found.evidence) == (loss > 5)
        record.write_text('{"arguments": {"preset": "smoke"}}')
        [found] = report.judge_alignment(run)
        assert found.word == "cannot tell" and "too small" in found.evidence


def summary(**change: object) -> pd.DataFrame:
    row = dict(run="adaptive", mode="mean", ranked_by="mean", hero_layer=3, hero_head=1)
    row |= dict(second_layer=5, second_head=2, n_unit=35, unit="documents", delta=0.026)
    row |= dict(crossfit=0.02, crossfit_lo=0.01, crossfit_hi=0.03, p_top1=0.9, unique_hero=True)
    row |= dict(gap=0.01, gap_lo=0.001, gap_hi=0.02, base_loss=4.4, unigram_loss=6.7)
    return pd.DataFrame([row | change])


@pytest.mark.parametrize(
    "change, word, why, lead",
    [
        ({}, "supported", "ahead of L5H2", "and it stands out"),
        (
            dict(unique_hero=False, gap_lo=-0.01),
            "cannot tell",
            "another could as well be first",
            "it cannot be told from the next, L5H2",
        ),
        (
            dict(unique_hero=False, gap_elsewhere_lo=-0.01),
            "cannot tell",
            "in other documents another could be first",
            "whether it stands out cannot be told",
        ),
        (
            dict(unique_hero=False, p_missed=0.2, n_dropped=254, n_screen=9),
            "cannot tell",
            "one of 254 heads dropped after 9 sequences may be larger",
            "whether it stands out cannot be told",
        ),
        (
            dict(unique_hero=False, unigram_loss=4.0),
            "cannot tell",
            "worse than a unigram",
            "whether it stands out cannot be told",
        ),
        (
            dict(unique_hero=False, crossfit_lo=-0.01, gap_lo=-0.01),
            "cannot tell",
            "another",
            "No head of the adaptive model is told to matter",
        ),
        (
            dict(unique_hero=False, crossfit=math.nan, n_unit=7),
            "cannot tell",
            "7 documents are too few",
            "7 documents are too few to tell",
        ),
    ],
)
def test_whether_a_head_stands_out(change, word, why, lead, tmp_path):
    run = run_of(tmp_path, results_ablation_summary=summary(**change))
    [found] = report.judge_heroes(run)
    assert found.word == word and why in found.evidence
    assert (found.tone == "good") == (word == "supported")
    assert lead in report.lead_hero(run)[0]


@pytest.mark.parametrize(
    "shift, word", [(-0.1, "supported"), (0.1, "not supported"), (0, "cannot tell")]
)
def test_sparse_autoencoders_are_judged_by_the_interval_over_layers(shift, word, tmp_path):
    noise = np.array([0.01, -0.01, 0.02, -0.02])
    arms = [
        pd.DataFrame(dict(run="adaptive", layer=range(4), fvu=0.3 + shift + noise)),
        pd.DataFrame(dict(run="control", layer=range(4), fvu=0.3)),
    ]
    [found] = report.judge_saes(run_of(tmp_path, saes__sae_metrics=pd.concat(arms)))
    assert found.word == word and (found.tone == "good") == (word == "supported")
    one_layer = pd.concat(arms).query("layer == 0")
    [found] = report.judge_saes(run_of(tmp_path, saes__sae_metrics=one_layer))
    assert found.word == "cannot tell" and "too few" in found.evidence


def telemetry_of(sigma: list[float], phase: str = "auto") -> pd.DataFrame:
    table = pd.DataFrame({"sigma_z": sigma, "sigma_filtered": sigma})
    steps = 10 * np.arange(1, len(sigma) + 1)
    columns = {"step": steps, "phase": phase, "sigma_resid": math.nan, "lambda": 1.0, "loss": 4.0}
    return table.assign(**columns, val_loss=4.0)


@pytest.mark.parametrize(
    "sigma, phase, word, lead",
    [
        ([1.0, 1.02] * 15, "auto", "supported", "at its setpoint 1"),
        ([1.0, 1.5] * 15, "auto", "not supported", "did not hold"),
        ([2.0, 2.5] * 15, "auto", "not supported", "did not hold"),
        ([1.0, 1.02] * 5, "auto", "cannot tell", "too few"),
        ([1.0, 1.02] * 15, "warmup", "cannot tell", "never closed"),
    ],
)
def test_whether_the_loop_held(sigma, phase, word, lead, tmp_path):
    run = run_of(tmp_path)
    telemetry_of(sigma, phase).to_csv(tmp_path / "adaptive" / "telemetry.csv", index=False)
    telemetry_of([3.0] * 30).assign(phase="").to_csv(tmp_path / "control.csv", index=False)
    arguments = '{"arguments": {"target_sigma": 1.0, "filter_beta": 0.8, "seed": 42}}'
    (tmp_path / "adaptive" / "run.json").write_text(arguments)
    [found] = report.judge_control(run)
    assert found.word == word and (found.tone == "good") == (word == "supported")
    # 66 letters of the smallest size are 344 pixels
    assert found.drawing is None or len(found.drawing.unit) * 344 / 66 <= report.WIDTH
    assert lead in report.lead_control(run)[0]
    assert "one training seed (42)" in report.lead_seeds(run)[0]


def test_an_axis_keeps_order_and_draws_what_has_no_end_to_its_border():
    dots = [report.Dot(1.0, -math.inf, 1.5, "a"), report.Dot(3.0, label="b")]
    drawing = report.draw(dots, [report.Mark(2.0, "limit"), report.Mark(0.0, "null", True)], "nats")
    first, second = drawing.dots
    limit, null = drawing.marks
    assert null.x == first.left < first.x < first.right < limit.x < second.x == second.right
    assert (limit.kind, null.kind) == ("threshold", "null") and second.y > first.y
    assert drawing.words == "nats: a 1 [-inf, 1.5]; b 3; limit; null"


def test_pages_that_are_there_are_linked_from_where_the_report_lies(tmp_path):
    run = run_of(tmp_path / "runs" / "a b")
    assert report.links(run, tmp_path / "results" / "report.html") == []
    for name in ("hero_analysis/hero_report.html", "saes/adaptive/L3/features.html"):
        path = run.path / name
        path.parent.mkdir(parents=True)
        path.touch()
    found = {
        link.words: link.address for link in report.links(run, tmp_path / "results" / "x.html")
    }
    assert found == {
        "The head that matters most, in detail": "../runs/a%20b/hero_analysis/hero_report.html",
        "Features of the SAE adaptive/L3": "../runs/a%20b/saes/adaptive/L3/features.html",
    }


def test_every_run_is_listed_the_ablation_and_the_control_included(tmp_path):
    run = run_of(tmp_path)
    record = dict(script="s.py", argv=["s.py"], git=dict(commit="c", dirty=False), exit_status=0)
    parts = ["activations/control", "saes/control", "adaptive", "another"]
    for hour, part in enumerate(parts):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
        done = record | dict(time=f"2026-01-01T0{hour}:00:00+0000", end="2026-01-01T09:00:00+0000")
        (tmp_path / part / "run.json").write_text(json.dumps(done))
    # Another command wrote its run.json over that of the ablation, whose sidecar still knows it
    producer = record | dict(script="ablation_test.py", time="2026-01-01T08:00:00+0000")
    del producer["exit_status"]
    (tmp_path / "results_ablation.csv.json").write_text(json.dumps(dict(producer=producer)))
    assert report.commands_table(run)["part"].tolist() == [*parts, "ablation"]
