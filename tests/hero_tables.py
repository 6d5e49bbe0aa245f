"""Small hand-made tables of the hero analysis, for the sentences and pages that are built from them."""

import math

import pandas as pd

import hero_head_analysis as hero

MEASURED = dict(n=53, unit="document", sequences=96, split="validation", tests=7)


def head(role: str, run: str = "adaptive", layer: int = 3, number: int = 1) -> dict:
    return dict(role=role, run=run, layer=layer, head=number)


def impact(value: float = 0.03, low: float = 0.018, high: float = 0.038, n: int = 53):
    rows = []
    for role, of_head in {"hero": value, "random 1": 0.007, "random 2": 0.012}.items():
        row = head(role, layer=len(rows)) | dict(value=of_head, ci_low=low, ci_high=high)
        row |= MEASURED | dict(n=n, on_top_1_percent=0.67, on_top_low=0.58, on_top_high=0.84)
        rows.append(row)
    return pd.DataFrame(rows)


def score(name: str, value: float, above: tuple[float, float], others: list[float], **more):
    """Rows of one score: the hero's, whose interval is ± .01, and those of other heads."""
    low, high = above
    measured = dict(score=name, **MEASURED, null=value - (low + high) / 2)
    mine = dict(value=value, ci_low=value - 0.01, ci_high=value + 0.01)
    mine |= dict(above_null_low=low, above_null_high=high) | more
    rows = [head("hero") | measured | mine]
    for i, other in enumerate(others, 1):
        rows.append(head(f"random {i}", layer=i) | measured | dict(value=other))
    return rows


def copying(value: float, null_max: float):
    row = head("hero") | dict(score=hero.OV_COPYING, value=value, unit="permutation", n=40)
    return [row | dict(null=0.0, null_max=null_max)]


def scores():
    rows = score("previous token", 0.53, (-0.02, 0.01), [0.22, 0.29])
    rows += score("duplicate token", 0.03, (-0.05, -0.02), [0.02, 0.08])
    return pd.DataFrame(rows + copying(0.33, 0.1))


def kept(mechanism: str, value: float, low: float, high: float, chance: tuple):
    """The two rows of a mechanism; chance: value, low, high of as much at random."""
    about = head("hero") | dict(mechanism=mechanism, impact=0.03, impact_low=0.018)
    about |= MEASURED | dict(impact_high=0.038)
    claimed = about | dict(kind="claimed", value=value, ci_low=low, ci_high=high)
    at_random = dict(kind="matched-random", value=chance[0], ci_low=chance[1], ci_high=chance[2])
    return [claimed, about | at_random]


def preserving():
    rows = kept("keys: previous token", 0.19, 0.05, 0.47, (0.02, -0.02, 0.06))
    rows += kept("keys: 0-5 tokens back", 0.99, 0.97, 1.01, (0.24, 0.1, 0.4))
    rows += kept("all SAE features", 1.0, 0.99, 1.02, (-0.09, -math.inf, 0.37))
    return pd.DataFrame(rows)


def features(texts: list[str]):
    """Three features with their twins; only that of the least share has an effect."""
    rows = []
    effects = {7: (-0.0003, -0.0014, 0.0005), 8: (0.01, -0.02, 0.05), 9: (0.004, 0.001, 0.006)}
    for i, (number, (value, low, high)) in enumerate(effects.items()):
        row = head("hero") | MEASURED | dict(feature=number, kind="hero", share=0.9 - i / 10)
        row |= dict(frequency=0.01, value=value, ci_low=low, ci_high=high)
        row |= dict(raises=texts[0], lowers=texts[-1])
        rows.append(row)
        rows.append(row | dict(feature=100 + number, kind="matched-random", value=1e-5))
    return pd.DataFrame(rows)


def inactive(run: str = "adaptive", difference: tuple = (0.5, 0.1, 0.9)):
    """How well two scores find the heads that do nothing; difference: value, low, high."""
    found = {"write_norm": (0.6, 0.3, 0.8), "first position": (0.1, -0.2, 0.4)}
    rows = []
    for score, (value, low, high) in (found | dict(difference=difference)).items():
        row = dict(run=run, score=score, spearman=value, ci_low=low, ci_high=high)
        rows.append(row | dict(n=36, unit="head"))
    return pd.DataFrame(rows)


def tables(texts: list[str]) -> dict[str, pd.DataFrame]:
    """Every table of the reports, with these texts wherever a token or a name stands."""
    context = [dict(feature=7, kind="hero", activation=2.0, context=text) for text in texts]
    needed = [dict(context=t, next=t, delta_nats=1.0, attends_to=f"{t} (3 back)") for t in texts]
    written = [head("hero") | dict(source=t, raises=t, lowers=t) for t in texts]
    pairs = [head("hero") | dict(offset=1, query=t, key=t, logits=1.0, sds=3.0) for t in texts]
    parts = [dict(component=t, value=1.5, ci_low=1.0, ci_high=2.0) | MEASURED for t in texts]
    windows = []
    for position, text in enumerate(texts):
        row = dict(chosen="saves most", document=1, window=2, position=position, token=text)
        row |= dict(delta_nats=math.nan)
        if position:
            row |= dict(delta_nats=0.5, key_1=0, key_token_1=text, attention_1=1.0)
        windows.append(row)
    grid = [dict(run=t, layer=0, head=0, delta=0.1, ci_lo=0.0, ci_hi=0.2) for t in texts]
    named = [dict(run=t, layer=0, head=0, score=t, value=0.5, null=0.1, role="") for t in texts]
    return {
        "impact": impact(),
        "scores": scores(),
        "preserving": preserving(),
        "features": features(texts),
        "contexts": pd.DataFrame(context),
        "tokens": pd.DataFrame(needed),
        "ov": pd.DataFrame(written),
        "qk_pairs": pd.DataFrame(pairs),
        "dla": pd.DataFrame(parts),
        "windows": pd.DataFrame(windows),
        "importance": pd.DataFrame(grid).assign(rank=1, studied=True),
        "head_types": pd.DataFrame(named),
        "inactive": inactive(texts[0]),
    }


def standing(**changes) -> hero.Standing:
    facts = dict(name="L3H1", first="L3H1", n_heads=36, p_top1=0.63, p_max_t=0.0001)
    return hero.Standing(**(facts | dict(summary=pd.Series(dtype=object)) | changes))


def report(texts: list[str], title: str = "title", missing: str = "", **changes) -> hero.Report:
    made = tables(texts) | changes
    findings = hero.findings(standing(), made)
    return hero.Report(title, findings, made, missing, [title])


def data(found: hero.Report, texts: list[str]) -> dict:
    shown = hero.Text(hero.torch.zeros(1, len(texts)), lambda ids: texts, "--text", None)
    return hero.page_data(found.tables, [], shown)
