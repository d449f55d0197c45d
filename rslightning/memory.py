"""The memory of a training step, by part, from the model's shape: standard library only.

An estimate of the largest number of bytes in tensors at one time, for one process. What the
libraries take beside them (a CUDA context is about half a GiB) and what the allocator leaves unused
between them is not in it: leave a margin.

With several processes, beside the parts that each has:

- DDP keeps the gradients in buckets, too.
- FSDP2 gathers the weights of two layers, the one in use and the next, and has whole gradients of
  two, the one that is computed and the one that is being summed.
- DeepSpeed takes buckets for gradients whose size is fixed, however little is trained: two under
  ZeRO-1 and 2 (`overlap_comm`), from the first gradient of a step to the last, one under ZeRO-3 for
  good. With Lightning's 200 million entries that is 0.75 and 0.37 GiB in 16 bit. On a CPU only the
  pages that are written are real; on a GPU all of it is. What is gathered after a step goes where
  it belongs: `allgather_bucket_size` costs nothing. Its step makes one tensor of a process's part
  of the gradients, and a float32 one of that: at high ranks this is the peak.
- ZeRO-1 has whole gradients where a step accumulates them, which is what is estimated, and else a
  part of them.
- ZeRO-3 gathers each linear map by itself and keeps it if it is used again soon. Matrices below
  100,000 entries are kept whole besides (`stage3_param_persistence_threshold`), which is not in it.

DeepSpeed's sizes are taken to be the defaults.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from rslightning.cost import GIB, kept_entries, loss_rows
from rslightning.model_shape import Block, ModelShape
from rslightning.training_step import WIDE, TrainingStep

DEEPSPEED_BUCKET: Final = 200_000_000
"""Entries of a bucket of gradients (`reduce_bucket_size`), as Lightning sets it."""

DEEPSPEED_REUSE: Final = 1_000_000_000
"""Entries of weights; what is used again before so many others are stays gathered (ZeRO-3)."""

DEEPSPEED_PREFETCH: Final = 50_000_000
"""Entries of weights that are gathered ahead (ZeRO-3)."""


CUBLAS_BYTES: Final = 2 * 2**25
"""Room that cuBLAS takes on a Hopper GPU for each of two threads: forward and backward."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process, by part.

    Attributes:
        frozen: Frozen weights.
        trained: Trained weights: the adapters', or all of them.
        gradients: Gradients of the trained weights.
        optimizer: State of the optimizer.
        activations: What the backward pass needs of the forward pass, beyond the room in which it
            then puts gradients.
        work: The largest of what the loss works on (logits of some positions), what the backward
            pass of one layer does, with the layer itself where it was recomputed, and what the
            optimizer's step takes beyond what is over by then: the activations, the exchange. On
            a GPU cuBLAS has some room, too.
        exchange: Gathered weights and buckets, where several processes work together.
        host: Of the host's memory, where the state is kept there; not in `total`.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    exchange: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts but the host's."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return name -> bytes of all parts but the host's."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "host"}

    def __str__(self) -> str:
        listed = ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in self.parts().items() if size
        )
        return f"{self.total / GIB:.2f} GiB ({listed})"


def estimate_memory(shape: ModelShape, step: TrainingStep) -> MemoryEstimate:
    """Estimate the peak of the bytes that a training process holds, once it has made a step.

    The backward pass makes gradients while it uses up activations, so that they need room for the
    larger of the two only, but where gradients of before are kept, and under DeepSpeed.

    Args:
        shape: Sizes of the model.
        step: What it is trained on and how.
    """
    sharding = step.sharding
    wide_training = step.compute_bytes == WIDE or not sharding.masters
    matrices = list(_trained_matrices(shape, step))
    entries = sum(rows * columns for rows, columns in matrices)
    entry_bytes = step.base_bytes if step.ranks is None else step.adapter_bytes
    state = step.optimizer.state_bytes(matrices, entry_bytes)
    if not wide_training:
        state = step.optimizer.state_bytes(matrices, WIDE) + entries * WIDE
        entry_bytes = step.compute_bytes
    gradients = sharding.share(entries * entry_bytes, sharding.gradients)
    activations = _activation_bytes(shape, step)
    if not (step.keeps_gradients or sharding.masters):
        late = gradients - _first_gradients(shape, step)
        activations = max(activations - late, 0)
    exchange = _exchange_bytes(shape, step, entries * entry_bytes)
    frozen = 0 if step.ranks is None else _base_bytes(shape, step)
    weights = {
        "frozen": sharding.share(frozen, sharding.weights),
        "trained": sharding.share(entries * entry_bytes, sharding.weights),
    }
    state = sharding.share(state, sharding.optimizer)
    host = state * sharding.optimizer_on_host + sum(weights.values()) * sharding.weights_on_host
    return MemoryEstimate(
        **(dict.fromkeys(weights, 0) if sharding.weights_on_host else weights),
        gradients=gradients,
        optimizer=0 if sharding.optimizer_on_host else state,
        activations=activations,
        work=max(
            _loss_bytes(shape, step),
            _layer_bytes(shape, step),
            _step_bytes(step, entries) - activations - exchange,
        )
        + (0 if step.on_cpu else CUBLAS_BYTES),
        exchange=exchange,
        host=host,
    )


def _first_gradients(shape: ModelShape, step: TrainingStep) -> int:
    """Return the gradients that there are while all activations are: those of a head, if any."""
    if step.ranks is not None:
        return 0
    return step.sharding.share(shape.head.entries * step.base_bytes, step.sharding.gradients)


def _trained_matrices(shape: ModelShape, step: TrainingStep) -> Iterator[tuple[int, int]]:
    """Yield rows and columns of everything that is trained."""
    if step.ranks is None:
        for linear in shape.maps[: -1 if shape.tied else None]:
            yield linear.out_features, linear.in_features
        yield shape.embedding // shape.hidden, shape.hidden
        bare = shape.parameters - shape.embedding
        bare -= sum(linear.entries for linear in shape.maps[: -1 if shape.tied else None])
        yield bare, 1  # norms, biases and experts
        return
    for linear in filter(step.is_trained, shape.maps):
        rank = step.ranks[linear.path]
        yield rank, linear.in_features
        yield linear.out_features, rank


def _base_bytes(shape: ModelShape, step: TrainingStep) -> int:
    if step.map_bytes is None:
        return shape.parameters * step.base_bytes
    maps = sum(linear.entries for block in shape.blocks for linear in block.maps)
    return round(maps * step.map_bytes) + (shape.parameters - maps) * step.base_bytes


def _activation_bytes(shape: ModelShape, step: TrainingStep) -> int:
    """Return what waits for the backward pass; with checkpointing the inputs of the layers."""
    mask = step.rows * step.length**2
    hidden = step.tokens * shape.hidden
    if step.activation_checkpointing:
        return len(shape.blocks) * hidden * step.base_bytes + mask
    last_norm = hidden * WIDE
    return sum(_kept_bytes(shape, block, step) for block in shape.blocks) + last_norm + mask


def _layer_bytes(shape: ModelShape, step: TrainingStep) -> int:
    """Return what the backward pass of one layer works on."""
    inner = max(block.inner for block in shape.blocks)
    largest = max(linear.entries for block in shape.blocks for linear in block.maps)  # W + BA, or G
    work = (2 * step.tokens * inner + largest) * step.compute_bytes
    work += _whole_gradients(shape, step)
    if not step.activation_checkpointing:
        return work
    whole = max(_kept_bytes(shape, block, step) for block in shape.blocks)
    shared = step.tokens * shape.hidden * WIDE if step.base_bytes == WIDE else 0
    return work + whole - shared  # in float32 its first norm keeps the layer's input


def _kept_bytes(shape: ModelShape, block: Block, step: TrainingStep) -> int:
    """Return what the backward pass needs of the forward pass of a layer.

    Norms compute in float32; queries, keys, values (repeated for the groups that share them) and
    the attention's output; what the gate and its product are made of; inputs of what is trained,
    and a copy of W where it is stored in another dtype than it is multiplied in and has no adapter.
    """
    width = step.compute_bytes
    entries = 4 * shape.attention + block.inner * (3 if shape.gated else 4)
    entries += block.experts_per_token * shape.hidden
    if block.experts_per_token and step.ranks is None:  # inputs of router and experts
        entries += (1 + block.experts_per_token) * shape.hidden + block.inner
    wide_entries = shape.norms * shape.hidden
    if shape.head_norms:
        wide_entries += shape.attention + shape.key_width
    per_token = width * (entries + _kept_inputs(block, step)) + WIDE * wide_entries
    if step.ranks is None:
        per_token += step.base_bytes * shape.norms * shape.hidden
    if step.dropout:
        mask_bytes = width if step.on_cpu else 1
        per_token += mask_bytes * sum(x.in_features for x in block.maps if step.is_trained(x))
    if scores := max(shape.kept_scores, int(step.eager_attention)):
        softmax = WIDE if width == WIDE else WIDE + width  # in float32, and what it is cast to
        per_token += shape.heads * step.length * (softmax + width * (scores - 1))
    plain = [linear for linear in block.maps if step.ranks is None or not step.is_trained(linear)]
    cast = sum(linear.entries for linear in plain) + block.bare * bool(block.experts_per_token)
    copies = cast * width if step.casts_weights else 0
    return step.tokens * per_token + copies + _kept_by_adapters(block, step)


def _kept_inputs(block: Block, step: TrainingStep) -> int:
    """Return the entries per token of the inputs of what is trained; the attention keeps its own.

    Maps that read the same share it, unless each makes a copy of its own.
    """
    trained = [linear for linear in block.maps if step.is_trained(linear)]
    if step.dropout:
        return sum(linear.in_features for linear in trained)
    inputs = [(linear.reads, linear.in_features) for linear in trained if linear.reads != "heads"]
    return sum(size for _, size in (inputs if step.casts_weights else set(inputs)))


def _kept_by_adapters(block: Block, step: TrainingStep) -> int:
    if step.ranks is None:
        return 0
    layers = [step.layer(linear) for linear in block.maps if step.is_trained(linear)]
    entries = sum(kept_entries(layer, step.order(layer)) for layer in layers)
    return entries * step.compute_bytes


def _loss_bytes(shape: ModelShape, step: TrainingStep) -> int:
    """Return the logits of a chunk with their softmax, and the gradients by the head's input and W.

    Where logits are more than the product of the head, they exist for all positions at a time.
    """
    logits = step.tokens * shape.vocabulary * WIDE
    gradients = step.tokens * shape.hidden * step.base_bytes
    if shape.whole_logits:
        return logits * 3 + gradients
    trains_head = step.ranks is None
    if trains_head:
        gradients += shape.head.entries * WIDE
    at_once = loss_rows(shape.vocabulary, step.on_cpu, trains_head)
    rows, part = (min(step.tokens, count) for count in at_once)
    copies = 1 + (step.on_cpu and step.compute_bytes < WIDE)  # a CPU widens logits aside
    entry_bytes = step.compute_bytes * rows + WIDE * copies * part
    return shape.vocabulary * entry_bytes + gradients


def _step_bytes(step: TrainingStep, entries: int) -> int:
    """Return what DeepSpeed's step makes of a part of the gradients: a tensor, that in float32.

    ZeRO-3 has its bucket then, too.
    """
    sharding = step.sharding
    if not sharding.masters or sharding.optimizer_on_host:
        return 0
    copies = step.compute_bytes + (WIDE if step.compute_bytes < WIDE else 0)
    bucket = DEEPSPEED_BUCKET * step.compute_bytes * sharding.weights
    return sharding.share(entries * copies, sharding.optimizer) + bucket


def _whole_gradients(shape: ModelShape, step: TrainingStep) -> int:
    """Return the gradients of two layers: one's are computed, those of another summed (FSDP2)."""
    if not step.sharding.weights or step.sharding.masters:
        return 0
    if step.ranks is None:
        return 2 * max(block.parameters for block in shape.blocks) * step.base_bytes
    return 2 * max(_adapter_entries(block, step) for block in shape.blocks) * step.adapter_bytes


def _exchange_bytes(shape: ModelShape, step: TrainingStep, gradients: int) -> int:
    """Return the buckets of gradients, and the weights that are gathered at one time."""
    sharding = step.sharding
    exchange = gradients if sharding.buckets and sharding.processes > 1 else 0
    if sharding.masters:  # which takes buckets as large as this, however little is trained
        exchange += DEEPSPEED_BUCKET * step.compute_bytes * (1 if sharding.weights else 2)
    if sharding.weights and (sharding.parts > 1 or sharding.weights_on_host):
        exchange += _gathered_bytes(shape, step)
    return exchange


def _gathered_bytes(shape: ModelShape, step: TrainingStep) -> int:
    """Return the weights that are gathered at one time: two layers, or what DeepSpeed keeps.

    ZeRO-3 keeps what is used again before `DEEPSPEED_REUSE` entries of others are. Of the last
    layers that is in the backward pass, which comes back to them over as many entries. Where layers
    are recomputed, no more than two were found at the peak.
    """
    layers = 2 * max(_unit_bytes(block, step) for block in shape.blocks)
    layers = max(layers, shape.embedding * step.base_bytes)
    if not step.sharding.masters or step.activation_checkpointing:
        return layers
    largest = max(shape.embedding, *(x.entries for x in shape.maps))
    kept = (DEEPSPEED_REUSE // 2 + DEEPSPEED_PREFETCH + largest) * step.base_bytes
    everything = sum(_unit_bytes(block, step) for block in shape.blocks)
    return max(layers, min(kept, everything))


def _unit_bytes(block: Block, step: TrainingStep) -> int:
    """Return the bytes of a layer's weights, adapters included."""
    width = step.compute_bytes if step.sharding.masters else step.adapter_bytes
    return block.parameters * step.base_bytes + _adapter_entries(block, step) * width


def _adapter_entries(block: Block, step: TrainingStep) -> int:
    ranks = step.ranks or {}
    return sum(
        ranks[linear.path] * (linear.in_features + linear.out_features)
        for linear in block.maps
        if linear.path in ranks
    )


def available_memory() -> int:
    """Return the bytes of this machine's memory that programs could have now."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return total_memory()
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def total_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
