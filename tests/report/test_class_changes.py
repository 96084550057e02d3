"""Changes of a metric by class: their order, their bars, and how numbers are read."""

import math
import re

import pytest

from varpi.errors import VarpiError
from varpi.report import ClassChanges, Page, render
from varpi.report.tables import class_changes, number


def names(part: tuple[str, list[dict]]) -> tuple[str, list[str]]:
    return part[0], [row["name"] for row in part[1]]


def test_few_classes_stand_in_one_list_from_best_to_worst():
    shown = class_changes(ClassChanges("class_agreement", {"a": (0.5, 0.4), "b": (0.5, 0.7), "c": (0.5, 0.5)}))
    assert [names(part) for part in shown["parts"]] == [("", ["b", "c", "a"])]
    rows = shown["parts"][0][1]
    assert [row["change"] for row in rows] == ["+0.200", "0", "−0.100"]
    assert [row["bar"] for row in rows] == pytest.approx([100, 0, -50])
    assert (shown["count"], shown["better"], shown["worse"], shown["median"]) == (3, 1, 1, "0")


def test_where_lower_is_better_a_fall_is_an_improvement():
    shown = class_changes(ClassChanges("fid", {"a": (30.0, 33.0), "b": (30.0, 25.0), "c": (30.0, 31.0)}))
    assert [names(part) for part in shown["parts"]] == [("", ["b", "c", "a"])]
    assert shown["parts"][0][1][0]["change"] == "−5.00"
    assert [row["bar"] > 0 for row in shown["parts"][0][1]] == [True, False, False]
    assert (shown["better"], shown["worse"], shown["median"]) == (1, 2, "+1.00")


def test_of_many_classes_the_most_changed_are_shown_from_both_ends():
    classes = {str(i): (0.5, 0.5 + (i - 3) / 100) for i in range(20)}
    shown = class_changes(ClassChanges("recall", classes, most=4))
    assert [names(part) for part in shown["parts"]] == [
        ("Most improved", ["19", "18", "17", "16"]),
        ("Most worsened", ["0", "1", "2"]),  # the fourth from the end did not change
    ]


def test_bars_start_at_the_zero_line():
    page = render(Page("t", "p", "c", per_class=[ClassChanges("recall", {"a": (0.5, 0.7), "b": (0.5, 0.4)})]))
    assert page.count('<svg viewBox="-50.0 0 150.0 12"') == 2
    bars = re.findall(r'<rect class="(\w+)" x="([-.\d]+)" y="2" width="([.\d]+)"', page)
    assert bars == [("gain", "0.0", "100.0"), ("loss", "-50.0", "50.0")]


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (14.3567, 4, "14.36"),
        (0.81116, 4, "0.8112"),
        (3012.4, 4, "3012"),
        (-0.25, 3, "−0.250"),
        (0, 4, "0"),
        (1.5e-9, 4, "0.000000"),
        (9.99996, 4, "10.000"),
    ],
)
def test_digits_of_a_number_without_a_spread(value, digits, shown):
    assert number(value, digits) == shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ClassChanges("fidelity", {"a": (1, 2)}), "no changes by class of fidelity; known are frechet_distance"),
        (ClassChanges("entropy_gap", {"a": (1, 2)}), "no changes by class of entropy_gap; known are"),
        (ClassChanges("fid", {}), "changes of fid by class need a class"),
        (ClassChanges("fid", {"a": (1, 2)}, most=0), "`most` of at least 1"),
        (ClassChanges("fid", {"a": (1, math.nan)}), r"fid of class a is \(1, nan\); it must be finite"),
        (ClassChanges("fid", {"a": (1,)}), r"fid of class a is \(1,\)"),  # type: ignore[dict-item]
    ],
)
def test_bad_changes(changes, message):
    with pytest.raises(VarpiError, match=message):
        class_changes(changes)
