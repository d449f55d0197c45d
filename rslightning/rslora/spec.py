"""What to adapt and how: the whole configuration of the method in one frozen record."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from rslightning.errors import UserError
from rslightning.rslora.scaling import (
    Scaling,
    check_alpha,
    check_rank,
    check_scaling,
    scaling_factor,
)

Init = Literal["kaiming_uniform", "gaussian", "rank_corrected"]

TARGET_GROUPS = ("all_linear", "attention", "mlp")

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class RankAllocation:
    """How AdaLoRA shares a budget of ranks out among the modules (`rslora/adalora.py`).

    Steps are those of the optimizer, counted from 1.

    Args:
        target_rank: Rank that a module has in the end, on average.
        warmup_steps: First steps, in which every module has its whole rank.
        final_steps: Last steps, in which the ranks that are left are trained alone.
        every_n_steps: Steps between two allocations; between them all ranks are trained.
        orthogonality: Weight in the loss of how far A and B are from being orthogonal.
        beta1: Decay of the mean importance of an entry, per step.
        beta2: Decay of the mean deviation from that, per step.

    Raises:
        UserError: If a value is out of its range; the message names the field and the value.
    """

    target_rank: int
    warmup_steps: int
    final_steps: int
    every_n_steps: int = 1
    orthogonality: float = 0.5
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        check_rank(self.target_rank, "allocation.target_rank")
        check_rank(self.every_n_steps, "allocation.every_n_steps")
        for name in ("warmup_steps", "final_steps"):
            if not isinstance(steps := getattr(self, name), int) or steps < 0:
                raise UserError(f"allocation.{name} is a number of steps, got {steps!r}.")
        weight = self.orthogonality
        if not _is_number(weight) or not 0.0 <= weight < math.inf:
            raise UserError(
                f"allocation.orthogonality must be 0 or positive and finite, got {weight!r}."
            )
        for name in ("beta1", "beta2"):
            if not _is_number(beta := getattr(self, name)) or not 0.0 <= beta < 1.0:
                raise UserError(f"allocation.{name} must be in [0, 1), got {beta!r}.")


@dataclass(frozen=True)
class AdapterSpec:
    """Rank, scaling and place of the adapters.

    Args:
        rank: r; from 4 to 2048 in the paper. `auto` is for recipes: the command replaces it by the
            highest rank that fits the memory, before there is a spec.
        alpha: Numerator of the scaling factor gamma_r.
        scaling: How gamma_r depends on the rank; see `rslightning.rslora.scaling`.
        targets: `all_linear` (every linear map of attention and MLP, never the output head or an
            embedding), `attention`, `mlp`, a list of module names (each a full path or its last
            segments), or a regular expression that matches full paths.
        dropout: Probability of zeroing an entry of the adapter's input during training.
        init: Distribution of A's entries. `kaiming_uniform` draws from U(-1/sqrt(in), 1/sqrt(in)),
            `gaussian` from a normal of the same variance 1/(3 in): neither depends on the rank.
            `rank_corrected` is `kaiming_uniform` times 1/sqrt(rank) (appendix B.3). B starts at 0.
        rank_pattern: Module name or regular expression -> rank, for modules that differ.
        alpha_pattern: The same for alpha.
        allocation: AdaLoRA: adapters `gamma_r B diag(E) A`, all of this rank at first, of which the
            run keeps the ranks that matter most. A and B are then drawn from N(0, 0.02^2), and E
            starts at 0. None keeps every rank.

    Raises:
        UserError: If a value is out of its range; the message names the field and the value. With
            `allocation`, also if its target is not below `rank`, or `init` or `rank_pattern` is
            given.
    """

    rank: int | Literal["auto"] = 8
    alpha: float = 16.0
    scaling: Scaling = "rslora"
    targets: str | list[str] = "all_linear"
    dropout: float = 0.0
    init: Init = "kaiming_uniform"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    allocation: RankAllocation | None = None

    def __post_init__(self) -> None:
        self._check_rank()
        check_alpha(self.alpha)
        check_scaling(self.scaling)
        for key, rank in self.rank_pattern.items():
            check_rank(rank, f"rank_pattern[{key!r}]")
        for key, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"alpha_pattern[{key!r}]")
        if self.init not in get_args(Init):
            raise UserError(f"init must be one of {', '.join(get_args(Init))}; got {self.init!r}.")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout!r}.")
        if not self.targets:
            raise UserError("targets is empty; use all_linear, attention, mlp or module names.")
        self._check_expressions()
        if self.allocation is not None:
            self._check_allocation(self.allocation)

    def _check_allocation(self, allocation: RankAllocation | Mapping[str, Any]) -> None:
        if isinstance(allocation, Mapping):  # as checkpoints keep it
            allocation = RankAllocation(**allocation)
            object.__setattr__(self, "allocation", allocation)
        assert isinstance(self.rank, int)  # see `_check_rank`
        if allocation.target_rank >= self.rank:
            raise UserError(
                f"allocation.target_rank is {allocation.target_rank}, which leaves nothing to take "
                f"away from rank {self.rank}: give a higher rank, or leave allocation out."
            )
        if self.rank_pattern:
            raise UserError("allocation chooses the rank of each module: leave rank_pattern out.")
        if self.init != AdapterSpec.init:
            raise UserError(
                f"init is {self.init!r}, but with allocation A and B are drawn from N(0, 0.02^2), "
                "as AdaLoRA does: leave init out."
            )

    def _check_rank(self) -> None:
        if self.rank == "auto":
            raise UserError(
                "rank: auto is for the rslightning command, which resolves it; here give a number."
            )
        check_rank(self.rank)

    def _check_expressions(self) -> None:
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _path_end(pattern)
        if isinstance(self.targets, str):
            _check_expression(self.targets)

    def resolve(self, path: str) -> "ResolvedAdapter":
        """Return rank, alpha and scaling of the module at `path`.

        Raises:
            UserError: If two patterns match `path` and disagree.
        """
        assert isinstance(self.rank, int)  # see `_check_rank`
        rank = _resolve(path, self.rank_pattern, self.rank, "rank_pattern")
        alpha = _resolve(path, self.alpha_pattern, self.alpha, "alpha_pattern")
        return ResolvedAdapter(rank, alpha, self.scaling)


@dataclass(frozen=True)
class ResolvedAdapter:
    """The method's numbers for one module, after the patterns have been applied."""

    rank: int
    alpha: float
    scaling: Scaling

    @property
    def gamma(self) -> float:
        """The scaling factor gamma_r."""
        return scaling_factor(self.rank, self.alpha, self.scaling)


def pattern_matches(pattern: str, path: str) -> bool:
    """Tell whether `pattern` names `path`: a full path, its last segments, or an expression.

    This is PEFT's rule, so that a pattern means the same in an exported adapter.

    Raises:
        UserError: If `pattern` is no such expression.
    """
    return _path_end(pattern).fullmatch(path) is not None


def unmatched_patterns(spec: AdapterSpec, paths: Sequence[str]) -> list[str]:
    """Return the keys of both pattern tables that name none of `paths`."""
    keys = [*spec.rank_pattern, *spec.alpha_pattern]
    return [key for key in keys if not any(pattern_matches(key, path) for path in paths)]


def _path_end(pattern: str) -> re.Pattern[str]:
    _check_expression(pattern)
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except re.error as error:
        raise UserError(
            f"{pattern!r} is not a regular expression for the end of a path: {error.msg}."
        ) from None


def _check_expression(expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(f"{expression!r} is not a regular expression: {error}.") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _resolve(path: str, table: Mapping[str, Number], default: Number, name: str) -> Number:
    matches = {key: value for key, value in table.items() if pattern_matches(key, path)}
    if len(set(matches.values())) > 1:
        listed = ", ".join(f"{key!r}: {value}" for key, value in matches.items())
        raise UserError(f"{name} is ambiguous for {path}: {listed}; make the patterns disjoint.")
    return next(iter(matches.values()), default)
