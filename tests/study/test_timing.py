"""The time that a study spends in each section is measured."""

from __future__ import annotations

import pytest

from optuna_nnhp.study import budget
from optuna_nnhp.study.budget import Timing


def test_nested_sections_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(budget.time, "perf_counter", lambda: next(clock))
    sections = Timing()
    with sections("outer"), sections("inner"):  # at 1, 3 to 6, 10
        pass
    assert sections.seconds == {"outer": 2.0 + 4.0, "inner": 3.0}


def test_seconds_move_between_sections() -> None:
    timing = Timing()
    timing.seconds["training"] = 3.0
    timing.move_seconds("training", "asking", 1.0)
    assert timing.seconds == {"training": 2.0, "asking": 1.0}
