"""Which simulation stands behind each p value and interval that is printed. A statistic without one is not printed.

The simulations are in tests/test_calibration_*.py, a file a script, or in the tests of what they are about. JANUS_LONG_CALIBRATION=1 makes them ten times as long.
"""

import ast
import re
from pathlib import Path

import pandas as pd
import pytest

TESTS = Path(__file__).resolve().parent
KEPT = TESTS.parent / "docs" / "numbers"
# Columns that say how uncertain something is: intervals, p and q values, what a null gives
UNCERTAIN = re.compile(
    r"(^|_)(lo|hi|low|high)(_pct)?$|^[pq](_|$)|(^|_)null(_|$)|^smallest_p|_within$"
)

# CSV -> column (or its beginning, with *) -> the file of simulations, and the test in it
SIMULATED = {
    "topology_stats.csv": {
        "ci_*": ("sae", "test_topology_intervals_cover"),
        "null_*": ("sae", "test_the_null_holds_what_turned_bases_give"),
    },
    "table2.csv": dict.fromkeys(
        ["l0_*", "mse_*", "fvu_*", "ce_recovered_*"], ("sae", "test_intervals_over_documents_cover")
    ) | {"gain_*": ("sae_nulls", "test_the_interval_of_a_gain_holds_the_truth_in_95_percent")},
    "results_ablation_summary.csv": {
        "gap_*": ("ablation", "test_intervals_of_the_first_head_hold_the_truth_in_95_percent"),
        "crossfit_*": ("ablation", "test_intervals_of_the_first_head_hold_the_truth_in_95_percent"),
        "difference_*": ("ablation", "test_intervals_of_the_first_head_hold_the_truth_in_95_percent"),
        "effective_heads_*": ("ablation", "test_effective_heads_count_equal_heads_of_many"),
        "p_maxT": ("ablation", "test_without_an_effect_errors_are_as_rare_as_promised"),
        "p_missed": ("two_stages", "test_that_a_dropped_head_leads_is_ruled_out_no_more_often_than_is_said"),
        "heads_to_spare_*": ("together", "test_the_interval_of_the_heads_to_spare_holds_the_truth"),
        "quiet_to_spare_*": ("together", "test_the_interval_of_the_heads_to_spare_holds_the_truth"),
    },
    "results_ablation_table3.csv": dict.fromkeys(
        ["ci_all_*", "p_maxT"], ("ablation", "test_without_an_effect_errors_are_as_rare_as_promised")
    ),
    "hero_preserving.csv": {
        "ci_*": ("hero", "test_a_share_of_the_impact"),
        "impact_*": ("hero", "test_a_mean_over_documents"),
    },
    "hero_inactive.csv": {"ci_*": ("hero", "test_rank_correlations_over_heads")},
    "seeds_summary.csv": {
        "ci_*": ("seeds", "test_intervals_over_seeds_hold_all_differences_at_once"),
        "p_*": ("seeds", "test_p_values_over_seeds_are_uniform_or_larger"),
    },
    "layers.csv": {
        "median_ci_*": ("energy_features", "test_the_median_over_features_with_copies"),
        "token_null*": ("energy", "test_fdr_of_both_tests_holds_with_near_copies"),
        "aligned_within": ("energy", "test_fdr_of_both_tests_holds_with_near_copies"),
        "direction_null*": ("energy", "test_fdr_against_random_directions_holds_with_near_copies"),
        "smallest_p*": ("energy", "test_few_planted_features_are_found_among_many"),
    },
    "predictors.csv": {
        "ci_*": ("energy_features", "test_spearman_over_features_with_copies"),
        "minus_efas_*": ("energy_features", "test_a_difference_between_predictors_is_found"),
    },
    "compared.csv": {"more_*": ("benchmarks", "test_the_interval_over_layers_holds_the_truth")},
}  # fmt: skip
SIMULATED["untrained.csv"] = SIMULATED["layers.csv"]
SIMULATED["sae_nulls.csv"] = SIMULATED["table2.csv"]

# Columns that look like one and are none: what they are instead
DESCRIPTIVE = {
    "null": "the name of the null that a row is of",
    "p_top1": "share of resamples that the head leads in; METRICS.md says that it is no probability",
    "max_share_null": "median with heads shuffled: an orientation, no test",
    "top1_over_top2_null": "the same",
    "gini_null": "the same",
    "exp_entropy_null": "the same",
    "robust_z_null": "the same",
    "se_ratio_lo": "the least over heads, no interval",
    "se_ratio_hi": "the most over heads, no interval",
}


def stands_behind(csv: str, column: str) -> bool:
    """Whether a simulation, or a reason, stands behind a column."""
    patterns = SIMULATED.get(csv, {})
    starts = [pattern.removesuffix("*") for pattern in patterns if pattern.endswith("*")]
    return column in patterns or column in DESCRIPTIVE or column.startswith(tuple(starts))


@pytest.mark.parametrize("csv", sorted({path.name for path in KEPT.rglob("*.csv")}))
def test_every_kept_interval_and_p_value_was_simulated(csv):
    """README and RESULTS are made of these files."""
    columns = set()
    for path in KEPT.rglob(csv):
        columns |= set(pd.read_csv(path, nrows=1))
    uncertain = {column for column in columns if UNCERTAIN.search(column)}
    assert [column for column in sorted(uncertain) if not stands_behind(csv, column)] == []


def test_every_simulation_that_is_named_exists():
    for csv, columns in SIMULATED.items():
        for column, (file, name) in columns.items():
            places = [TESTS / f"test_calibration_{file}.py", TESTS / f"test_{file}.py"]
            place = next(path for path in places if path.exists())
            source = place.read_text(encoding="utf-8")
            names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}  # fmt: skip
            assert name in names, (csv, column)


def test_a_column_without_a_simulation_is_found():
    assert UNCERTAIN.search("loss_lo") and UNCERTAIN.search("q_by") and UNCERTAIN.search("null_hi")
    assert not UNCERTAIN.search("base_loss") and not UNCERTAIN.search("perplexity")
    assert not stands_behind("topology_stats.csv", "p_value")
    assert not stands_behind("new.csv", "ci_lo")
