"""Seeded studies have the recorded values."""

from __future__ import annotations

from collections.abc import Iterator
import math

import pytest
import torch

from tests import golden

SUBSET = ("bayes_measured_size", "own_stacked", "gpt")  # run twice where there is no record


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_seeded_studies_have_the_recorded_values() -> None:
    machine, recorded = golden.read()
    if machine != golden.machine():
        pytest.skip("The record is of another machine, or of other versions.")
    assert list(recorded) == [study.__name__ for study in golden.STUDIES]
    assert not golden.differences(recorded, golden.record())


@pytest.mark.parametrize("name", SUBSET)
def test_the_same_seed_gives_the_same_study(name: str) -> None:
    first, second = golden.record(name), golden.record(name)
    assert first[name]["trials"]
    assert not golden.differences(first, second)


def test_a_changed_bit_is_a_difference() -> None:
    _, recorded = golden.read()
    changed = golden.read()[1]
    trial = changed["gpt"]["trials"][0]
    value = float.fromhex(trial["value"])
    trial["value"] = math.nextafter(value, math.inf).hex()
    found = golden.differences(recorded, changed)
    assert found == [f"gpt: trials.0.value: {value.hex()} -> {trial['value']}"]


def test_a_renamed_hyperparameter_is_no_difference() -> None:
    for old, new in golden.RENAMED.items():
        before = {"study": {"trials": [{"params": {old: 1}}]}}
        after = {"study": {"trials": [{"params": {new: 1}}]}}
        assert not golden.differences(before, after)
