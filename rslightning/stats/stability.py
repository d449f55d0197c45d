r"""How gradient and output depend on the rank at step 0: slopes, and what they say.

Definition 3.1 of D. Kalajdzievski (arXiv:2312.03732) calls adapters rank-stabilized if their output
and the gradient into their input stay Theta(1) in the rank r. With B = 0 and gamma_r = alpha / r^p
(p: "rank exponent"; A's variance free of r, so that |A x| grows as r^(1/2)) one step gives

    quantity                           slope in log-log over r      lora (p = 1)   rslora (p = 1/2)
    |dL/dB| = gamma |G (A x)^T|        1/2 - p                      -1/2           0
    output, SGD:   dB ~ |dL/dB|        1 - 2 p                      -1             0
    output, Adam:  dB ~ learning rate  1 - p                        0              1/2

The paper proves the first two. The third follows since Adam's first step is the learning rate times
the sign of the gradient, whatever its size: gamma sum_i |(A x)_i| has r terms of equal size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FLAT: Final = 0.1
"""Below this size a measured slope counts as constant: a factor of 1.5 from rank 4 to rank 256."""

CAVEAT: Final = (
    "Adam's first step changes every entry of B by the learning rate, whatever the size of the\n"
    "gradient: a gradient norm that is free of the rank does not make the output's change free\n"
    'of it. SGD\'s step is as large as the gradient. "Stable" is a statement about an optimizer,\n'
    "a learning rate and, here, the first step."
)

MATMUL: Final = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)
"""Where torch keeps how exact float32 products are, on GPU and CPU."""


@dataclass(frozen=True)
class RankPoint:
    """What was measured with one scaling at one rank.

    Attributes:
        scaling: Name of the scaling.
        rank: r.
        gradient_norm: Mean over the adapter matrices of the L2 norm of the gradient at step 0.
        output_change: Root mean square of the change of the logits after one step.
    """

    scaling: str
    rank: int
    gradient_norm: float
    output_change: float


@dataclass(frozen=True)
class Theory:
    """Slopes over the rank that theory predicts; see the module's docstring."""

    gradient_norm: float
    output_change_sgd: float
    output_change_adam: float


@dataclass(frozen=True)
class Slopes:
    """Measured slopes of one scaling beside the predicted ones; NaN where none can be fitted."""

    scaling: str
    gradient_norm: float
    output_change: float
    theory: Theory

    @property
    def is_flat(self) -> bool:
        """Whether the output's change does not depend on the rank."""
        return abs(self.output_change) < FLAT


@dataclass(frozen=True)
class Step:
    """The step that was taken, in words for the report.

    Attributes:
        optimizer: Name of its class.
        learning_rate: Its learning rate.
        remark: What else was done to the gradient or left out, or nothing.
    """

    optimizer: str
    learning_rate: float
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.optimizer} at learning rate {self.learning_rate:g}"


def predict_slopes(rank_exponent: float) -> Theory:
    """Return the slopes for gamma_r |A x| = r^(1/2 - p).

    Args:
        rank_exponent: p. An initialization that scales A by 1/sqrt(r) adds 1/2 to it.
    """
    p = rank_exponent
    return Theory(0.5 - p, 1 - 2 * p, 1 - p)


def log_log_slope(ranks: Sequence[int], values: Sequence[float]) -> float:
    """Return the least-squares slope of log(value) over log(rank).

    NaN if it is not defined: a value that is not positive and finite, or fewer than two ranks.
    """
    if len(set(ranks)) < 2 or not all(value > 0 and math.isfinite(value) for value in values):
        return math.nan
    x = torch.tensor(ranks, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def fit_slopes(points: Sequence[RankPoint], rank_exponents: Mapping[str, float]) -> list[Slopes]:
    """Return the slopes of each scaling.

    Args:
        points: The measurements.
        rank_exponents: Scaling -> p, in the order of the result.
    """
    slopes = []
    for scaling, exponent in rank_exponents.items():
        own = [point for point in points if point.scaling == scaling]
        ranks = [point.rank for point in own]
        slopes.append(
            Slopes(
                scaling,
                log_log_slope(ranks, [point.gradient_norm for point in own]),
                log_log_slope(ranks, [point.output_change for point in own]),
                predict_slopes(exponent),
            )
        )
    return slopes


def root_mean_square(values: Tensor) -> float:
    """Return the root of the mean square of all entries, summed in float64 on the CPU.

    Elsewhere the sum is in float32, by trees, as of `stats.gradients.squared_norms`.
    """
    dtype = torch.float64 if values.device.type == "cpu" else torch.float32
    norm = torch.linalg.vector_norm(values, dtype=dtype)
    return float(norm) / math.sqrt(max(1, values.numel()))


def describe_stability(points: Sequence[RankPoint], slopes: Sequence[Slopes], step: Step) -> str:
    """Return the report: both tables, the verdict, and what the verdict depends on."""
    remark = f", {step.remark}" if step.remark else ""
    title = f"Rank stability of the first step: {step}{remark}."
    parts = [title, _values_table(points), _slopes_table(slopes), verdict(slopes, step), CAVEAT]
    return "\n\n".join(parts)


def verdict(slopes: Sequence[Slopes], step: Step) -> str:
    """Return one sentence: which scaling keeps the output's change constant with this step."""
    unknown = [each for each in slopes if math.isnan(each.output_change)]
    flat = [each for each in slopes if each.is_flat]
    growing = [each for each in slopes if each not in flat and each not in unknown]
    clauses = []
    if flat:
        clauses.append(f"{_list(flat)} {_verb(flat)} the output's change constant over the rank")
    if growing:
        does = "do not" if len(growing) > 1 else "does not"
        keep = "" if flat else " keep the output's change constant over the rank"
        clauses.append(f"{_list(growing)} {does}{keep}")
    if unknown:
        names = " and ".join(each.scaling for each in unknown)
        clauses.append(f"nothing can be said of {names}, whose change is zero or not finite")
    return f"With {step}, {'; '.join(clauses)}."


class Float32Compute(TorchFunctionMode):
    """Computes everything inside in float32, whatever the weights are stored in.

    The change of an output after one step is smaller than the rounding of 16-bit logits. Inside,
    each torch function sees its 16-bit arguments as float32 copies, which live as long as the call,
    so that a large model needs no second copy of itself. Use it without gradients: a graph would
    keep the copies. Matrix products use all bits of float32 (no TF32).
    """

    def __enter__(self) -> "Float32Compute":
        """Begin."""
        self._matmul = [backend.fp32_precision for backend in MATMUL]
        for backend in MATMUL:
            backend.fp32_precision = "ieee"
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End; leave the settings as they were."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for backend, precision in zip(MATMUL, self._matmul, strict=True):
            backend.fp32_precision = precision

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` with widened arguments; a property is read where it is."""
        if getattr(func, "__name__", "") == "__get__":
            found = func(*args)
            return _widen(found) if isinstance(found, torch.dtype) else found
        return func(*_widen(args), **_widen(kwargs or {}))


def _widen(value: Any) -> Any:
    """Return `value` with float32 in place of shorter floating types, in nested lists, too."""
    if isinstance(value, Tensor):
        return value.float() if _is_short(value.dtype) else value
    if isinstance(value, torch.dtype):
        return torch.float32 if _is_short(value) else value
    if isinstance(value, list | tuple):
        return type(value)(map(_widen, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {key: _widen(entry) for key, entry in value.items()}
    return value


def _is_short(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4


def _values_table(points: Sequence[RankPoint]) -> str:
    lines = [f"{'scaling':<16}{'rank':>6}{'gradient norm':>16}{'output change':>16}"]
    lines += [
        f"{point.scaling:<16}{point.rank:>6}{point.gradient_norm:>16.4e}"
        f"{point.output_change:>16.4e}"
        for point in points
    ]
    return "\n".join(lines)


def _slopes_table(slopes: Sequence[Slopes]) -> str:
    heads = ("measured", "theory, SGD", "theory, Adam")
    lines = [f"{'slope over the rank':<32}" + "".join(f"{head:>14}" for head in heads)]
    for each in slopes:
        theory = each.theory
        rows = {
            "gradient norm": (each.gradient_norm, theory.gradient_norm, theory.gradient_norm),
            "output change": (
                each.output_change,
                theory.output_change_sgd,
                theory.output_change_adam,
            ),
        }
        for name, numbers in rows.items():
            cells = "".join(f"{number:>+14.2f}" for number in numbers)
            lines.append(f"{each.scaling:<16}{name:<16}{cells}")
    return "\n".join(lines)


def _list(slopes: Sequence[Slopes]) -> str:
    return " and ".join(f"{each.scaling} (slope {each.output_change:+.2f})" for each in slopes)


def _verb(slopes: Sequence[Slopes]) -> str:
    return "keep" if len(slopes) > 1 else "keeps"
