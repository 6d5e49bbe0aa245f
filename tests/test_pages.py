"""The templates of pages/: what no page may do, and what a script does without them."""

import importlib.util
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import feature_dashboard  # noqa: E402
import hero_tables  # noqa: E402
import report  # noqa: E402

import energy_lens_minimal as lens  # noqa: E402
import hero_head_analysis as hero  # noqa: E402

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "</style><b>",
    "{{ title }}{% block main %}",
    "&lt;",
    "<!--",
]


class Page(HTMLParser):
    """What a page is made of: tags, attributes, and the text that a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.raw = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.raw = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.raw = False

    def handle_data(self, data):
        self.text += "" if self.raw else data


def hero_page(folder: Path) -> str:
    found = hero_tables.report(HOSTILE, HOSTILE[0])
    found.findings.append(hero.Finding(HOSTILE[1], HOSTILE[2]))
    found.notes.append(HOSTILE[3])
    return hero.html_report(found, hero_tables.data(found, HOSTILE), folder)


def energy_page(folder: Path) -> str:
    image = folder / "figure.png"
    Image.new("RGB", (30, 20)).save(image)
    table = pd.DataFrame({HOSTILE[0]: HOSTILE, "value": np.nan})
    blocks = [("h", HOSTILE[0]), ("p", HOSTILE[2]), ("t", table), ("img", (image, HOSTILE[2]))]
    lens.write_report(HOSTILE[0], blocks, folder / "report.md")
    return (folder / "report.html").read_text()


def feature_page() -> str:
    tokens = [feature_dashboard.Token(text, value - 3.0) for value, text in enumerate(HOSTILE)]
    tokens.append(feature_dashboard.Token("peak", 2.0, is_peak=True))
    context = feature_dashboard.Context(2.0, tokens)
    places = [feature_dashboard.Place(HOSTILE[0], 3, -0.5)]
    feature = feature_dashboard.Feature(
        number=7,
        n_active=3,
        frequency=0.01,
        largest=2.0,
        counts=[2, 1],
        edges=[0.1, 1.0, 2.0],
        groups=[feature_dashboard.Group(HOSTILE[0], 2.0, 0.1, 3, [context])],
        usual=[feature_dashboard.UsualToken(HOSTILE[0], 0.5, 0.1)],
        origin=feature_dashboard.Origin(tokens, places, [0.5, -1.0]),
        heads=[0.25, 0.75],
        raises=tokens,
        lowers=tokens,
    )
    return feature_dashboard.render(HOSTILE[0], HOSTILE, [feature])


def report_page() -> str:
    table = pd.DataFrame({"what": HOSTILE, HOSTILE[0]: HOSTILE})
    picture = report.Picture("data:image/webp;base64,", 30, 20)
    download = report.Download("a.csv", "3 kB", "data:text/csv;base64,")
    exhibit = report.Exhibit(*[HOSTILE[0]] * 8)
    cards = [report.Card(HOSTILE[2], exhibit, download, picture)]
    cards.append(report.Card(HOSTILE[0], exhibit, report.Download(HOSTILE[0], "9 MB"), picture))
    cell = report.GridCell("1.0", "0.500", HOSTILE[2])
    heads = report.GridTable("mean", HOSTILE[0], [0], {0: [cell]})
    grid = report.Grid("grid0", ["mean"], [heads])
    parts = [report.SectionOfRun(HOSTILE[0], cards, grid, table)]
    parts.append(report.SectionOfRun(HOSTILE[0], missing=HOSTILE[0], remedy=HOSTILE[1]))
    dots = [report.Dot(1.0, label=HOSTILE[2]), report.Dot(2.0, 1.5, 2.5, HOSTILE[3])]
    drawing = report.draw(dots, [report.Mark(0, HOSTILE[1])], HOSTILE[0])
    verdicts = [report.Verdict(HOSTILE[0], "cannot tell", HOSTILE[1], drawing)]
    return hero.render_page(
        "report.html",
        title=HOSTILE[0],
        runs=[report.PageRun(Path(HOSTILE[0]), HOSTILE, [], verdicts, HOSTILE[1], table)],
        headlines=table,
        sections=[(report.Section(HOSTILE[0], report.hero, "make hero"), parts)],
        show=report.show,
    )


@pytest.fixture(params=["hero", "energy_lens", "features", "report"])
def page(request, tmp_path) -> str:
    """Each page, filled with markup where a file's text would stand."""
    make = {
        "hero": lambda: hero_page(tmp_path),
        "energy_lens": lambda: energy_page(tmp_path),
        "features": feature_page,
        "report": report_page,
    }
    return make[request.param]()


def test_a_page_needs_nothing_from_elsewhere(page):
    parsed = Page(page)
    for name, value in parsed.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:", "#")), f"{name}={value}"
    assert "link" not in parsed.tags and "iframe" not in parsed.tags
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket", page)


def test_text_of_a_file_is_never_markup(page):
    parsed = Page(page)
    assert all(text in parsed.text for text in HOSTILE)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert not [value for name, value in parsed.attributes if name == "src" and value == "x"]


def test_every_template_is_one_of_these_pages():
    """A new page must join the list above."""
    pages = {path.stem for path in (ROOT / "pages").glob("*.html")} - {"page", "table"}
    assert pages == {"hero", "energy_lens", "features", "report"}


# ------------------------------------------------------------------- scripts without the folder
def copied_alone(name: str, folder: Path) -> ModuleType:
    """A script in a folder of its own, loaded from there."""
    path = shutil.copy(ROOT / f"{name}.py", folder)
    spec = importlib.util.spec_from_file_location(f"{name}_alone", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_hero_script_alone_writes_markdown_and_says_what_the_page_needs(tmp_path, capsys):
    alone = copied_alone("hero_head_analysis", tmp_path)
    found = hero_tables.report(["a"])
    data = hero_tables.data(found, ["a"])
    assert hero.html_report(found, data, tmp_path) and capsys.readouterr().out == ""
    assert alone.html_report(found, data, tmp_path) == ""
    assert alone.markdown_report(found) == hero.markdown_report(found)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "the page needs the folder pages/ beside hero_head_analysis.py" in said


def test_energy_lens_alone_writes_markdown_and_leaves_no_page_of_an_earlier_run(tmp_path, capsys):
    (tmp_path / "script").mkdir()
    alone = copied_alone("energy_lens_minimal", tmp_path / "script")
    blocks = [("h", "heading"), ("t", pd.DataFrame({"x": [1.5]}))]
    path = tmp_path / "report.md"
    lens.write_report("title", blocks, path)
    markdown = path.read_bytes()
    assert path.with_suffix(".html").is_file() and capsys.readouterr().out == ""
    alone.write_report("title", blocks, path)
    assert path.read_bytes() == markdown and not path.with_suffix(".html").exists()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "the page needs the folder pages/ beside energy_lens_minimal.py" in said


SVG = "<svg xmlns='http://www.w3.org/2000/svg' width='10pt'>%s</svg>"


@pytest.mark.parametrize(
    "drawing",
    [
        SVG % "<script>alert(1)</script>",
        SVG % "<a href='javascript:x'><text>a</text></a>",
        SVG % "<text style='fill:url(http://example.org/b)'>a</text>",
        SVG % "<foreignObject/>",
        SVG.replace(" width", " onload='x()' width") % "",
        "<svg",
        "",
    ],
)
def test_a_drawing_that_could_do_more_than_be_seen_is_not_put_into_a_page(drawing, tmp_path):
    png = tmp_path / "x.png"
    png.write_bytes(b"\x89PNG")
    for ending in (".svg", ".narrow.svg"):
        png.with_suffix(ending).write_text(drawing, encoding="utf-8")
    assert hero.figure_html(png, "a <b>").startswith('<img alt="a &lt;b&gt;"')
    # One that can only be seen is
    for ending in (".svg", ".narrow.svg"):
        text = "<text style='fill: #000000; clip-path: url(#p)'>a</text>"
        png.with_suffix(ending).write_text(SVG % text, encoding="utf-8")
    shown = hero.figure_html(png, 'a "b"')
    assert shown.count("<svg") == 2 and "currentColor" in shown and "&quot;b&quot;" in shown
