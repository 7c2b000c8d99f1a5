from __future__ import annotations

import pytest

from optuna_nnhp.hyperparameters.width import layer_widths
from optuna_nnhp.hyperparameters.width import padded_width
from optuna_nnhp.hyperparameters.width import scale_width_to_octave

PADDED = [16, 32, 64, 128, 1024]


@pytest.mark.parametrize(
    "width, shape, hidden_layers, expected",
    [
        (64, "constant", 1, [64]),
        (64, "constant", 3, [64, 64, 64]),
        (64, "funnel", 1, [64]),
        (64, "funnel", 2, [64, 16]),
        (128, "funnel", 4, [128, 96, 64, 32]),
        (100, "funnel", 3, [100, 62, 25]),
        (1, "funnel", 3, [1, 1, 1]),
    ],
)
def test_layer_widths(width: int, shape: str, hidden_layers: int, expected: list[int]) -> None:
    assert layer_widths(width, shape, hidden_layers) == expected


@pytest.mark.parametrize("hidden_layers", range(1, 9))
@pytest.mark.parametrize("width", [1, 2, 17, 1000])
def test_a_funnel_never_widens_nor_vanishes(width: int, hidden_layers: int) -> None:
    widths = layer_widths(width, "funnel", hidden_layers)
    assert len(widths) == hidden_layers and widths[0] == width
    assert sorted(widths, reverse=True) == widths and min(widths) >= 1


@pytest.mark.parametrize("width", [*range(1, 70), 127, 128, 129, 1000, 65536])
def test_padding_is_the_least_power_of_two_that_holds(width: int) -> None:
    padded = padded_width(width)
    assert padded.bit_count() == 1 and padded >= max(16, width)
    assert padded == 16 or padded < 2 * width


@pytest.mark.parametrize("padded", PADDED)
def test_a_folded_width_belongs_to_the_stack(padded: int) -> None:
    for width in range(1, 3000):
        assert padded_width(scale_width_to_octave(width, padded)) == padded


@pytest.mark.parametrize("padded", PADDED)
def test_a_width_that_belongs_already_stays(padded: int) -> None:
    for width in range(1 if padded == 16 else padded // 2 + 1, padded + 1):
        assert scale_width_to_octave(width, padded) == width


@pytest.mark.parametrize("padded", PADDED)
def test_folding_keeps_the_place_within_the_octave(padded: int) -> None:
    for width in range(17, 2000):
        share = width / padded_width(width)  # in (1/2, 1]
        # To the next whole number, and to the one after at the octave's open end.
        assert abs(scale_width_to_octave(width, padded) - share * padded) <= 1


@pytest.mark.parametrize(
    "width, padded, expected", [(100, 512, 400), (700, 64, 44), (20, 16, 10), (64, 64, 64)]
)
def test_fold_width(width: int, padded: int, expected: int) -> None:
    assert scale_width_to_octave(width, padded) == expected
