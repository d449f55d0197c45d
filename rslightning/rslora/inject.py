"""Find the linear maps to adapt, wrap them, freeze the rest; report what was and was not done."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rslightning.errors import UserError
from rslightning.rslora.linear import (
    LoRALinear,
    adapter_layers,
    is_linear,
    linear_features,
    named_modules,
    plain_path,
)
from rslightning.rslora.quantized import is_quantized
from rslightning.rslora.spec import (
    TARGET_GROUPS,
    AdapterSpec,
    ResolvedAdapter,
    unmatched_patterns,
)
from rslightning.rslora.threads import one_thread_each

ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


@dataclass(frozen=True)
class InjectionReport:
    """What `inject_adapters` did.

    Attributes:
        modules: Path of each adapted module -> its rank, alpha and gamma_r, in module order.
        trainable_parameters: Number of adapter entries.
        total_parameters: Number of entries of all parameters, adapters included.
        uncovered: Names of the weights of two or more dimensions, embeddings and output head aside,
            that no adapter covers.
        uncovered_share: Their share of all such weights, in [0, 1].
        unreachable: Those of them that no linear module owns (the 3-D experts of mixture models,
            routers held as bare parameters), or whose module the model does not call
            (`linear_modules`): no choice of targets reaches them.
        unreachable_share: Their share, in [0, 1].
    """

    modules: dict[str, ResolvedAdapter]
    trainable_parameters: int
    total_parameters: int
    uncovered: list[str]
    uncovered_share: float
    unreachable: list[str]
    unreachable_share: float

    @property
    def warning(self) -> str | None:
        """One sentence when part of the model is out of every adapter's reach, else None."""
        if not self.unreachable:
            return None
        examples = ", ".join(self.unreachable[:2]) + (", ..." if len(self.unreachable) > 2 else "")
        return (
            f"{self.unreachable_share:.0%} of the weights outside embeddings and head are bare "
            f"parameters, which adapters on linear modules cannot reach ({examples}): they stay "
            "frozen."
        )


@torch.no_grad()
def inject_adapters(
    model: nn.Module, spec: AdapterSpec, dtype: torch.dtype = torch.float32
) -> InjectionReport:
    """Wrap the targets of `spec` in `LoRALinear` and freeze everything else, in place.

    The output of `model` does not change, since B is zero, or E (AdaLoRA). A is drawn from torch's
    seed and the module's name alone (`LoRALinear.reset_adapter`).

    Args:
        model: Any module that holds linear maps.
        spec: What to adapt and how.
        dtype: Storage dtype of the adapters.

    Raises:
        UserError: If a target or pattern matches nothing that can be adapted, a target shares its
            weight with another module, two patterns disagree, or `model` has adapters already.
    """
    refuse_adapted(model)
    targets = select_targets(model, list(linear_modules(model)), spec.targets)
    refuse_tied(model, {path: model.get_submodule(path) for path in targets})
    refuse_unmatched(spec, targets)
    adapters = {path: spec.resolve(path) for path in targets}
    has_values = spec.allocation is not None
    report = _report(model, _shapes(model), adapters, has_values)

    layers = wrap_linears(model, adapters, spec.dropout, dtype, has_values)
    with one_thread_each() as (threads, _):  # 2,000 million numbers of a 7B model at rank 2048
        list(threads.map(lambda path: layers[path].reset_adapter(path, spec.init), layers))
    return report


def refuse_unmatched(spec: AdapterSpec, targets: Sequence[str]) -> None:
    """Raise `UserError` if a pattern of `spec` matches none of the adapted modules."""
    if unmatched := unmatched_patterns(spec, targets):
        raise UserError(
            f"rank_pattern or alpha_pattern key {unmatched[0]!r} matches none of the adapted "
            f"modules{_suggest(unmatched[0], targets)}"
        )


def refuse_adapted(model: nn.Module) -> None:
    """Raise `UserError` if `model` has adapters already."""
    if next(adapter_layers(model), None) is not None:
        raise UserError("The model has adapters already; merge or remove them before injecting.")


def refuse_tied(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise `UserError` if the weight of a target is another module's, too.

    Args:
        model: What holds the targets.
        targets: Path of each target -> the linear map there, or inside its adapter.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(plain_path(name))
    for path, linear in targets.items():
        others = [
            name for name in owners.get(id(linear.weight), []) if not name.startswith(f"{path}.")
        ]
        if others:
            raise UserError(
                f"{path} shares its weight with {others[0]}: merging an adapter would change both. "
                "Leave it out of targets, or untie the weights first."
            )


def wrap_linears(
    model: nn.Module,
    adapters: Mapping[str, ResolvedAdapter],
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    singular_values: bool = False,
) -> dict[str, LoRALinear]:
    """Freeze `model` and put a `LoRALinear` at each path; A is left uninitialized."""
    model.requires_grad_(False)
    layers = {}
    for path, adapter in adapters.items():
        base = model.get_submodule(path)
        layer = LoRALinear(base, adapter, dropout, dtype, singular_values)
        layers[path] = layer.train(base.training)
        set_module(model, path, layer)
    return layers


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of every linear map that runs as a module.

    Left out are those whose bare weight is read, where an adapter would silently take no part: the
    projections inside `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` (those of the latter
    in evaluation only), and the step sizes of a Mamba mixer (Mamba, FalconMamba, Jamba), which
    transformers calls where they are quantized only. So are weights that are no parameter, but
    computed from others at each call (weight norm, pruning, ...): none could be merged into.
    """
    bare: list[str] = []
    for path, module in named_modules(model):
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            bare.append(f"{path}.")
        is_mixer = type(module).__name__.endswith("MambaMixer")
        if is_mixer and not is_quantized(getattr(module, "dt_proj", module)):
            bare.append(f"{path}.dt_proj.")
    return {
        path: module
        for path, module in named_modules(model)
        if is_linear(module)
        and path
        and "weight" in module._parameters
        and not f"{path}.".startswith(tuple(bare))
    }


def select_targets(
    model: nn.Module, candidates: Sequence[str], targets: str | list[str]
) -> list[str]:
    """Return those paths of `candidates` that `targets` names, in module order.

    Raises:
        UserError: If nothing matches, or one name of a list matches nothing; the message lists
            what could match.
    """
    if targets in TARGET_GROUPS:
        assert isinstance(targets, str)
        selected = _select_group(model, candidates, targets)
    elif isinstance(targets, str):
        selected = [path for path in candidates if re.fullmatch(targets, path)]
        if not selected and any(_is_suffix(targets, path) for path in candidates):
            raise UserError(
                f"targets {targets!r} is an expression for full paths and matches none; to name "
                f"modules, write a list: [{targets}]."
            )
    else:
        for name in targets:
            if not any(_is_suffix(name, path) for path in candidates):
                raise UserError(
                    f"Target {name!r} matches no linear module{_suggest(name, candidates)}"
                )
        selected = [path for path in candidates if any(_is_suffix(n, path) for n in targets)]
    if not selected:
        raise UserError(
            f"targets {targets!r} matches no linear module{_suggest(str(targets), candidates)}"
        )
    return selected


def decoder_linears(model: nn.Module, candidates: Iterable[str]) -> list[str]:
    """Return the candidates inside the repeated blocks (`nn.ModuleList`): attention and MLP.

    The output head, embeddings and their projections stand outside of the blocks. A model without
    blocks counts as one block, its output head excepted.
    """
    lists = tuple(
        f"{path}." for path, module in named_modules(model) if isinstance(module, nn.ModuleList)
    )
    candidates = list(candidates)
    inside = [path for path in candidates if path.startswith(lists)]
    head = _output_head(model)
    return inside or [path for path in candidates if model.get_submodule(path) is not head]


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` in the place of what is there."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _select_group(model: nn.Module, candidates: Sequence[str], group: str) -> list[str]:
    linears = decoder_linears(model, candidates)
    if group == "all_linear":
        return linears
    attention = {path for path in linears if _in_attention(model, path)}
    return [path for path in linears if (path in attention) == (group == "attention")]


def _in_attention(model: nn.Module, path: str) -> bool:
    """Tell whether a module on the way to `path`, below its block, is an attention module."""
    segments = path.split(".")
    block = next((i for i, name in enumerate(segments) if name.isdigit()), -1)
    for depth in range(block + 1, len(segments) - 1):
        kind = type(model.get_submodule(".".join(segments[: depth + 1]))).__name__
        if ATTENTION.search(segments[depth]) or ATTENTION.search(kind):
            return True
    return False


def _is_suffix(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


def _suggest(name: str, candidates: Sequence[str]) -> str:
    """Return the end of a sentence that says what `name` could have been."""
    last_segments = sorted({path.rpartition(".")[2] for path in candidates})
    if not last_segments:
        return ": there is no linear module to adapt."
    known = {*last_segments, *TARGET_GROUPS, *candidates} - {name}
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Linear modules here: {', '.join(last_segments)}."


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the logical shape of every parameter, each shared one once, under its first name.

    A weight's own shape is no guide: it is packed in 4-bit layers and empty under ZeRO-3.
    """
    linear = {f"{path}.weight": linear_features(m) for path, m in linear_modules(model).items()}
    return {
        (name := plain_path(full)): linear.get(name)
        or tuple(getattr(parameter, "ds_shape", parameter.shape))
        for full, parameter in model.named_parameters()
    }


def _coverable(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Return name -> entries of every weight of two or more dimensions but embeddings and head."""
    head = _output_head(model)
    skipped = {
        f"{path}.weight"
        for path, module in named_modules(model)
        if isinstance(module, nn.Embedding) or module is head
    }
    return {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) >= 2 and name not in skipped
    }


def _report(
    model: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    adapters: dict[str, ResolvedAdapter],
    singular_values: bool,
) -> InjectionReport:
    weights = _coverable(model, shapes)
    uncovered = [name for name in weights if name.rpartition(".")[0] not in adapters]
    reachable = {f"{path}.weight" for path in linear_modules(model)}
    unreachable = [name for name in uncovered if name not in reachable]
    trainable = sum(
        adapter.rank * (sum(shapes[f"{path}.weight"]) + singular_values)
        for path, adapter in adapters.items()
    )
    total = sum(weights.values()) or 1
    return InjectionReport(
        modules=adapters,
        trainable_parameters=trainable,
        total_parameters=trainable + sum(math.prod(shape) for shape in shapes.values()),
        uncovered=uncovered,
        uncovered_share=sum(weights[name] for name in uncovered) / total,
        unreachable=unreachable,
        unreachable_share=sum(weights[name] for name in unreachable) / total,
    )
