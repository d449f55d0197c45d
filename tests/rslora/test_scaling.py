import ast
import math
from pathlib import Path

import numpy as np
import pytest

import rslightning
from rslightning.errors import UserError
from rslightning.rslora.scaling import (
    RANK_EXPONENT,
    equivalent_alpha,
    rank_corrected_gain,
    scaling_factor,
)

PACKAGE = Path(rslightning.__file__).parent
PAPER_RANKS = [4, 8, 32, 128, 512, 2048]


@pytest.mark.parametrize(
    ("scaling", "gamma"),
    [
        ("lora", 0.75),  # 12 / 16
        ("rslora", 3.0),  # 12 / 4
        ("quarter_root", 6.0),  # 12 / 2
        ("inverse_square", 0.046875),  # 12 / 256
        ("unit", 12.0),
    ],
)
def test_values_at_rank_16_and_alpha_12(scaling, gamma):
    assert scaling_factor(16, 12, scaling) == gamma
    assert scaling_factor(1, 12, scaling) == 12


@pytest.mark.parametrize(
    ("scaling", "slope"),
    [
        ("lora", -1.0),
        ("rslora", -0.5),
        ("quarter_root", -0.25),
        ("inverse_square", -2.0),
        ("unit", 0.0),
    ],
)
def test_slope_over_the_ranks_of_the_paper(scaling, slope):
    gammas = [scaling_factor(rank, 16.0, scaling) for rank in PAPER_RANKS]
    assert np.polyfit(np.log(PAPER_RANKS), np.log(gammas), 1)[0] == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("rank", PAPER_RANKS)
def test_rslora_is_lora_with_alpha_times_the_root_of_the_rank(rank):
    expected = scaling_factor(rank, 16.0 * math.sqrt(rank), "lora")
    assert scaling_factor(rank, 16.0, "rslora") == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("scaling", RANK_EXPONENT)
def test_equivalent_alpha_is_the_inverse(scaling):
    gamma = scaling_factor(13, 5.5, scaling)
    assert equivalent_alpha(gamma, 13, scaling) == pytest.approx(5.5, rel=1e-15)


@pytest.mark.parametrize(("rank", "gain"), [(1, 1.0), (4, 0.5), (64, 0.125)])
def test_rank_corrected_gain(rank, gain):
    assert rank_corrected_gain(rank) == gain


@pytest.mark.parametrize(
    ("rank", "alpha", "scaling", "message"),
    [
        (0, 1.0, "lora", "rank must be a positive integer, got 0."),
        (-3, 1.0, "lora", "rank must be a positive integer, got -3."),
        (4.0, 1.0, "lora", "rank must be a positive integer, got 4.0."),
        (True, 1.0, "lora", "rank must be a positive integer, got True."),
        ("8", 1.0, "lora", "rank must be a positive integer, got '8'."),
        (4, 0, "lora", "alpha must be positive and finite, got 0."),
        (4, -2.5, "lora", "alpha must be positive and finite, got -2.5."),
        (4, math.inf, "lora", "alpha must be positive and finite, got inf."),
        (4, math.nan, "lora", "alpha must be positive and finite, got nan."),
        (4, "16", "lora", "alpha must be a number, got '16'."),
        (4, True, "lora", "alpha must be a number, got True."),
        (
            4,
            1.0,
            "rsLoRA",
            "scaling must be one of lora, rslora, quarter_root, inverse_square, unit; "
            "got 'rsLoRA'.",
        ),
    ],
)
def test_bad_values_are_named(rank, alpha, scaling, message):
    with pytest.raises(UserError) as error:
        scaling_factor(rank, alpha, scaling)
    assert str(error.value) == message


def divisions_by_rank(source: str) -> list[str]:
    """Return every division, in source text, whose divisor speaks of a rank."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div | ast.FloorDiv)
        and not isinstance(node.right, ast.JoinedStr)  # a path of a process's rank
        and any(
            getattr(part, "id", getattr(part, "attr", None)) in {"r", "rank", "ranks"}
            for part in ast.walk(node.right)
        )
    ]


def test_only_this_module_divides_by_a_rank():
    files = sorted(PACKAGE.rglob("*.py"))
    found = {path.name for path in files if divisions_by_rank(path.read_text())}
    assert found == {"scaling.py"}


@pytest.mark.parametrize(
    "source",
    ["alpha / rank", "self.alpha / math.sqrt(self.rank)", "alpha / (spec.rank ** 0.5)", "a // r"],
)
def test_a_division_by_a_rank_is_noticed(source):
    assert divisions_by_rank(source) == [ast.unparse(ast.parse(source))]


def test_a_path_is_no_division():
    assert divisions_by_rank("folder / f'{rank}.json'") == []
