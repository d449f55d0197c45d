"""The scaling factor gamma_r: the one place in this package that divides by a rank.

An adapted layer computes `y = W x + b + gamma_r B A x` (D. Kalajdzievski, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732, eq. 2). Every `gamma_r` of the paper is
`alpha / r^p`; only the exponent p differs:

    scaling          p     gamma_r           in the paper
    lora             1     alpha / r         eq. 2, conventional LoRA: gradients collapse with r
    rslora           1/2   alpha / sqrt(r)   eq. 4, Theorem 3.2: the one that is stable
    quarter_root     1/4   alpha / r^(1/4)   eq. 12, too large
    inverse_square   2     alpha / r^2       eq. 13, too small
    unit             0     alpha             appendix B.3, with A scaled at initialization instead

With B = 0 the norm of the gradient at step 0 grows with the rank as `r^(1/2 - p)`.
"""

import math
from typing import Final, Literal, get_args

from rslightning.errors import UserError

Scaling = Literal["lora", "rslora", "quarter_root", "inverse_square", "unit"]

RANK_EXPONENT: Final[dict[Scaling, float]] = {
    "lora": 1.0,
    "rslora": 0.5,
    "quarter_root": 0.25,
    "inverse_square": 2.0,
    "unit": 0.0,
}
assert set(RANK_EXPONENT) == set(get_args(Scaling))


def scaling_factor(rank: int, alpha: float, scaling: Scaling) -> float:
    """Return gamma_r = alpha / rank^p, with p from `RANK_EXPONENT`.

    Args:
        rank: r, the inner dimension of the product B A; at least 1.
        alpha: The numerator; positive and finite.
        scaling: Which power of the rank divides it.

    Raises:
        UserError: If `rank` is not a positive integer, `alpha` is not a positive finite number, or
            `scaling` is not one of the five names.
    """
    check_rank(rank)
    check_alpha(alpha)
    check_scaling(scaling)
    return alpha / math.pow(rank, RANK_EXPONENT[scaling])


def equivalent_alpha(gamma: float, rank: int, scaling: Scaling) -> float:
    """Return the alpha for which `scaling_factor(rank, alpha, scaling)` is `gamma`.

    The inverse of `scaling_factor`: it writes one convention in the terms of another.
    """
    return gamma / scaling_factor(rank, 1.0, scaling)


def rank_corrected_gain(rank: int) -> float:
    """Return 1 / sqrt(rank), by which appendix B.3 multiplies A at initialization."""
    return scaling_factor(rank, 1.0, "rslora")


def check_rank(rank: int, name: str = "rank") -> None:
    """Raise `UserError` unless `rank` is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{name} must be a positive integer, got {rank!r}.")


def check_alpha(alpha: float, name: str = "alpha") -> None:
    """Raise `UserError` unless `alpha` is a positive finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{name} must be a number, got {alpha!r}.")
    if not math.isfinite(alpha) or alpha <= 0:
        raise UserError(f"{name} must be positive and finite, got {alpha!r}.")


def check_scaling(scaling: str) -> None:
    """Raise `UserError` unless `scaling` is one of the five names."""
    if scaling not in RANK_EXPONENT:
        raise UserError(f"scaling must be one of {', '.join(RANK_EXPONENT)}; got {scaling!r}.")
