"""Bars say the numbers they are drawn from."""

from __future__ import annotations

import re

from jaxtune.reporting.html.bars import ShareBar, bar, histogram


def test_a_histogram_has_a_bar_for_each_bin() -> None:
    made = histogram("Tokens", {"edges": [3, 5, 7, 8], "counts": [10, 0, 1]})
    assert re.findall(r"<title>(.*?)</title>", made) == ["3 to 4: 10", "5 to 6: 0", "7: 1"]
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', made)]
    assert heights[1] == 0
    assert heights[0] / heights[2] > 9
    assert "11 from 3 to 7 tokens, most (10) from 3 to 4" in made


def test_one_among_many_is_still_seen() -> None:
    made = histogram("Tokens", {"edges": [0, 1, 2], "counts": [10**6, 1]})
    assert 'height="1.0"><title>1: 1</title>' in made


def test_nothing_is_no_picture() -> None:
    assert histogram("Tokens", {"edges": [], "counts": []}) == ""


def test_a_share_beside_its_target() -> None:
    made = bar(ShareBar(0.25, before=0.5, target=0.75))
    assert "25.0%, before 50.0%, target 75.0%" in made
    for mark in ('class="bar" width="25.00"', 'class="was" y="10" width="50.00"', 'x="75.00"'):
        assert mark in made
    assert "aim" not in bar(ShareBar(1.0))
