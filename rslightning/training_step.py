"""What a training step consists of beside the model: batch, adapters, optimizer, processes.

Standard library only, so that a step can be planned where none could be made.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rslightning.cost import ORDERS, LayerShape, Order, cheapest_order, layer_cost
from rslightning.errors import UserError
from rslightning.model_shape import LinearShape, ModelShape

WIDE: Final = 4
"""Bytes of an entry in float32."""

STATE_SLOTS: Final = {
    "SGD": 0.0,
    "Adagrad": 1.0,
    "RMSprop": 1.0,
    "Lion": 1.0,
    "Adam": 2.0,
    "AdamW": 2.0,
    "Adamax": 2.0,
    "NAdam": 2.0,
    "RAdam": 2.0,
}
"""Class of an optimizer -> numbers that it keeps for each entry, in the entry's dtype."""

BLOCKWISE_SLOTS: Final = {"AdamW8bit": 2.0, "Adam8bit": 2.0, "Lion8bit": 1.0, "SGD8bit": 1.0}
"""The same for optimizers that keep 8 bits for each entry."""

BLOCKWISE_BYTES: Final = 1 + WIDE / 256
"""Bytes of such a number: one, and a float32 scale for each block of 256 (bitsandbytes)."""


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps.

    Attributes:
        name: Its class, without the path.
        extra_slots: Numbers that its options add for each entry (momentum, amsgrad).
    """

    name: str = "AdamW"
    extra_slots: int = 0

    @property
    def is_known(self) -> bool:
        """Whether its state is known; else it is taken to be AdamW's."""
        return self._plain in STATE_SLOTS | BLOCKWISE_SLOTS or self.name == "Adafactor"

    @property
    def _plain(self) -> str:
        return self.name.removeprefix("Paged")

    def state_bytes(self, matrices: Iterable[tuple[int, int]], entry_bytes: int) -> int:
        """Return the bytes of its state.

        Args:
            matrices: Rows and columns of everything that is trained.
            entry_bytes: Bytes of an entry of those.
        """
        matrices = list(matrices)
        if self.name == "Adafactor":  # the second moment's row and column sums alone
            sums = (
                rows + columns if min(rows, columns) > 1 else rows for rows, columns in matrices
            )
            return sum(sums) * entry_bytes
        entries = sum(rows * columns for rows, columns in matrices)
        if self._plain in BLOCKWISE_SLOTS:
            return round(entries * BLOCKWISE_SLOTS[self._plain] * BLOCKWISE_BYTES)
        return round(entries * (STATE_SLOTS.get(self.name, 2.0) + self.extra_slots) * entry_bytes)


@dataclass(frozen=True)
class Sharding:
    """What each of several processes keeps of the training state, the rest being the others'.

    Attributes:
        processes: How many there are.
        optimizer: Whether the optimizer's state is shared out.
        gradients: Whether gradients are.
        weights: Whether weights are; a layer is gathered while it is used, and the next one ahead.
        buckets: Whether the gradients lie in buckets for their exchange, too (DDP).
        masters: Whether 16-bit training keeps trained weights and gradients in 16 bit, and float32
            copies of them in the optimizer (DeepSpeed).
        optimizer_on_host: Whether the optimizer's state is in the host's memory.
        weights_on_host: Whether weights that no layer uses now are there, too.
        replicas: How many sets of all parts there are, each shared out by as many processes.
    """

    processes: int = 1
    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    buckets: bool = False
    masters: bool = False
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    replicas: int = 1

    @property
    def parts(self) -> int:
        """Number of the processes among which a set is shared out."""
        return self.processes // self.replicas

    def share(self, size: int, is_shared: bool) -> int:
        """Return one process's part of some bytes."""
        return -(-size // self.parts) if is_shared else size


@dataclass(frozen=True)
class TrainingStep:
    """What a process computes on, beside the model.

    Attributes:
        rows: Rows of a micro-batch.
        length: Tokens of a row, padding included.
        ranks: Path of each adapted map -> its rank; None is full fine-tuning.
        base_bytes: Bytes of an entry of the base.
        map_bytes: Bytes of an entry of the layers' linear maps, where they are quantized.
        adapter_bytes: Bytes of an entry of the adapters.
        compute_bytes: Bytes of an entry of an activation.
        optimizer: What trains.
        activation_checkpointing: Whether layers are recomputed in the backward pass.
        keeps_gradients: Whether there are gradients while the forward pass runs: those of the
            micro-batches before, or of the step before.
        dropout: Whether adapters drop entries of their input.
        eager_attention: Whether the attention keeps the scores [T, T].
        sharding: Who keeps what.
        on_cpu: Whether the device is a CPU, where a dropout keeps its factors, not bytes.
    """

    rows: int
    length: int
    ranks: Mapping[str, int] | None
    base_bytes: int = 2
    map_bytes: float | None = None
    adapter_bytes: int = WIDE
    compute_bytes: int = 2
    optimizer: Optimizer = field(default_factory=Optimizer)
    activation_checkpointing: bool = False
    keeps_gradients: bool = False
    dropout: bool = False
    eager_attention: bool = False
    sharding: Sharding = field(default_factory=Sharding)
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def casts_weights(self) -> bool:
        """Whether weights are multiplied in another dtype than they are stored in."""
        return self.map_bytes is None and self.base_bytes != self.compute_bytes

    def is_trained(self, linear: LinearShape) -> bool:
        """Tell whether a map has a gradient, or its adapter has."""
        return self.ranks is None or linear.path in self.ranks

    def layer(self, linear: LinearShape) -> LayerShape:
        """Return the sizes of an adapted map."""
        assert self.ranks is not None
        # Where W is packed or gathered by its owner, its product is not the adapter's business.
        with_base = not (self.dropout or self.map_bytes is not None or self.sharding.weights)
        return LayerShape(
            linear.in_features,
            linear.out_features,
            self.ranks[linear.path],
            self.tokens,
            base=with_base,
        )

    def order(self, layer: LayerShape) -> Order:
        """Return the order in which an adapted map is computed when training begins.

        In 16 bit W + gamma B A is not made then, and later it takes no more memory.
        """
        may_merge = self.compute_bytes == WIDE or not layer.base
        orders = [order for order in ORDERS if may_merge or not any(order[:2])]
        return cheapest_order(layer, orders)


def read_optimizer(name: str, options: Mapping[str, Any]) -> Optimizer:
    """Return what an optimizer keeps.

    Args:
        name: Its class or class path.
        options: Its arguments.
    """
    extra = sum(bool(options.get(option)) for option in ("momentum", "amsgrad", "centered"))
    return Optimizer(name.rpartition(".")[2], extra)


def read_sharding(
    name: str, options: Mapping[str, Any], processes: int, nodes: int = 1
) -> Sharding:
    """Return who keeps what under a strategy, one of ours or of Lightning.

    Args:
        name: Its registered name, class or class path.
        options: Its arguments, or what DeepSpeed's `zero_optimization` says.
        processes: How many there are.
        nodes: On how many nodes they are.

    Raises:
        UserError: If the strategy is not known.
    """
    name = name.rpartition(".")[2]
    if name == "ZeroStrategy" or name.lower().startswith("deepspeed"):
        return _read_deepspeed(name, options, processes)
    if processes == 1:
        return Sharding()
    if name in ("FSDP2Strategy", "ModelParallelStrategy"):
        replicas = nodes if options.get("replicate_nodes") else 1
        return Sharding(processes, optimizer=True, gradients=True, weights=True, replicas=replicas)
    if name in ("auto", "DDPStrategy") or name.startswith("ddp"):
        return Sharding(processes, buckets=not options.get("gradient_as_bucket_view"))
    raise UserError(
        f"What each process keeps under the strategy {name} is not known here; known are auto, "
        "ddp, FSDP2Strategy, ZeroStrategy, ModelParallelStrategy and deepspeed_stage_1 to 3."
    )


def _read_deepspeed(name: str, options: Mapping[str, Any], processes: int) -> Sharding:
    named = re.fullmatch(r"deepspeed_stage_([123])(_offload)?", name)
    stage = int(named[1]) if named else options.get("stage", 2)
    offload = bool(named and named[2])
    weights = offload or bool(options.get("offload_parameters") or options.get("offload_param"))
    return Sharding(
        processes,
        optimizer=stage >= 1,
        gradients=stage >= 2,
        weights=stage >= 3,
        masters=True,
        optimizer_on_host=offload or bool(options.get("offload_optimizer")),
        weights_on_host=stage >= 3 and weights,
    )


def quantized_bytes(quantization: Mapping[str, Any] | None) -> float | None:
    """Return the bytes of an entry of a quantized map, with its part of the scales; else None.

    Args:
        quantization: Arguments of transformers' `BitsAndBytesConfig`.
    """
    if not quantization:
        return None
    if quantization.get("load_in_8bit"):
        return 1.0  # and a scale for each row, which is next to nothing
    if quantization.get("bnb_4bit_use_double_quant"):  # a byte for 64, and a float for 256 of those
        return 0.5 + 1 / 64 + WIDE / (64 * 256)
    return 0.5 + WIDE / 64


def step_operations(shape: ModelShape, step: TrainingStep) -> float:
    """Return the operations of a micro-batch, recomputation included.

    Frozen maps take 2 T in out forward and as much for the gradient of their input, a trained one
    once more, an adapted one what its order takes (`rslightning.cost.layer_cost`); the attention
    4 T n width forward and twice that backward.
    """
    tokens = step.tokens
    forward = 4.0 * tokens * step.length * shape.attention * len(shape.blocks)
    total = 3 * forward
    for block in shape.blocks:
        maps = sum(linear.entries for linear in block.maps)
        experts = 3 * block.inner * shape.hidden * bool(block.experts_per_token)
        forward += 2 * tokens * (maps + experts)
        total += 2 * tokens * (maps + experts) * (3 if step.ranks is None else 2)
    total += 2 * tokens * shape.head.entries * (3 if step.ranks is None else 2)
    extra = _adapter_operations(shape, step)
    if step.activation_checkpointing:
        return total + forward + extra * 4 / 3
    return total + extra


def _adapter_operations(shape: ModelShape, step: TrainingStep) -> float:
    """Return what the adapters take beside their frozen maps."""
    if step.ranks is None:
        return 0.0
    layers = [step.layer(linear) for linear in shape.maps if linear.path in step.ranks]
    costs = (layer_cost(layer, step.order(layer)) for layer in layers)
    frozen = (4 * x.tokens * x.in_features * x.out_features * x.base for x in layers)
    return sum(costs) - sum(frozen)
