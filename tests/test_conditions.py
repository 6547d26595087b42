"""Labels to numbers and back: what is not known is zero, and what is drawn is complete."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from synthmed.conditions import Conditions, rounded
from synthmed.config import Categorical, Continuous
from synthmed.keys import Key

CONDITIONS = Conditions(
    {
        "diagnosis": Categorical(categories=("a", "b", "c")),
        "age": Continuous(low=40, high=90),
        "sex": Categorical(categories=("F", "M")),
        "load": Continuous(low=0, high=0.04),
    }
)


def test_each_label_has_its_own_numbers() -> None:
    encoded = CONDITIONS.encode({"diagnosis": "b", "age": 52.5, "sex": "M", "load": 0.04})
    assert encoded.tolist() == [0, 1, 0, -0.5, 1, 0, 1, 1, 1]
    assert CONDITIONS.width == 9
    assert CONDITIONS.widths == (3, 2, 2, 2)
    names = ("diagnosis a", "diagnosis b", "diagnosis c", "age", "age known")
    assert CONDITIONS.number_names == (*names, "sex F", "sex M", "load", "load known")


@pytest.mark.parametrize("known", ["diagnosis", "age", "sex", "load"])
def test_what_is_missing_is_zero_and_leaves_the_rest_alone(known: str) -> None:
    labels: dict[str, Any] = {"diagnosis": "b", "age": 65, "sex": "M", "load": 0.01}
    whole = CONDITIONS.encode(labels)
    without = CONDITIONS.encode({k: v for k, v in labels.items() if k != known})
    alone = CONDITIONS.encode({known: labels[known]})
    assert np.array_equal(whole, without + alone)
    assert not (without * alone).any()


def test_nothing_known_is_the_null_condition() -> None:
    assert not CONDITIONS.encode({}).any()
    # a number in the middle of its range is known all the same
    assert CONDITIONS.encode({"age": 65}).any()


@pytest.mark.parametrize("labels", [{"sex": "X"}, {"age": 39.9}, {"load": 0.05}, {"age": "old"}])
def test_a_value_outside_what_is_declared_is_an_error(labels: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"condition|could not convert"):
        CONDITIONS.encode(labels)


def test_encoded_conditions_are_drawn_uniformly_and_complete() -> None:
    drawn = torch.stack(
        [CONDITIONS.draw_encoded(torch.Generator().manual_seed(i)) for i in range(900)]
    ).numpy()
    assert drawn.shape == (900, 9)
    for part in (drawn[:, :3], drawn[:, 5:7]):
        assert (np.sort(part, 1)[:, -1] == 1).all() and (part.sum(1) == 1).all()
        assert chisquare(part.sum(0)).pvalue > 0.001
    for number, known in ((drawn[:, 3], drawn[:, 4]), (drawn[:, 7], drawn[:, 8])):
        assert (known == 1).all()
        assert kstest(number, "uniform", (-1, 2)).pvalue > 0.001
    # parts are drawn apart: no category goes with a place in the range
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 3])[0, 1]) < 0.15
    again = CONDITIONS.draw_encoded(torch.Generator().manual_seed(7))
    assert np.array_equal(again.numpy(), drawn[7])


def test_an_unconditional_model_has_no_numbers() -> None:
    nothing = Conditions({})
    assert nothing.width == 0
    assert nothing.encode({"age": 3}).shape == (0,)
    assert nothing.draw_encoded(torch.Generator()).shape == (0,)
    assert nothing.draw(Key.root(0)) == {}


def test_numbers_are_drawn_within_narrow_ranges() -> None:
    """One decimal would make every load of 0 to 0.04 a zero, and one of 0.08 leave its range."""
    loads = [float(CONDITIONS.draw(Key.root(i))["load"]) for i in range(300)]
    assert min(loads) >= 0 and max(loads) <= 0.04
    assert len(set(loads)) > 100
    narrow = [
        float(CONDITIONS.draw(Key.root(i), {"age": (70.03, 70.07)})["age"]) for i in range(50)
    ]
    assert min(narrow) >= 70.03 and max(narrow) <= 70.07
    assert Counter(len(str(CONDITIONS.draw(Key.root(i))["age"])) for i in range(50)).keys() == {4}


def test_rounding_never_leaves_the_range() -> None:
    assert rounded(0.9999, 0, 0.99991) == 0.99991 or rounded(0.9999, 0, 0.99991) <= 0.99991
    for low, high in ((0.0, 0.08), (41.37, 98.21), (-1e-3, 1e-3), (0.0, 1e6)):
        for value in np.linspace(low, high, 57):
            out = rounded(float(value), low, high)
            assert low <= out <= high
            assert abs(out - value) <= (high - low) / 200
