r"""The bytes that processes send each other in a training step: standard library only.

Of P processes each sends, for n bytes that all of them have or get,

    all-gather      n (P - 1) / P         every process has a part, then all have the whole
    reduce-scatter  n (P - 1) / P         every process has a whole, then each a part of the sum
    all-reduce      2 n (P - 1) / P       a reduce-scatter, then an all-gather

on a ring, which is the least that is possible (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", J. Parallel Distrib. Comput. 69, 2009). So an optimizer
step of N micro-batches takes, by the strategy, (P - 1) / P times

    strategy   gradients   weights
    DDP        2 g         0
    ZeRO-1     2 g         t
    ZeRO-2     2 g N       t
    FSDP2      g N         (2 w - u) N
    ZeRO-3     g N         2 w N, with activation checkpointing 3 w N at most

with g the bytes of the gradients of what is trained, t those of what is trained, w those of all
weights, frozen ones included, u those of the weights that belong to no layer, embedding or head of
their own. Frozen weights have no gradient, so that nothing of them is reduced. Compare the counts
of the ZeRO paper (arXiv:1910.02054, section 7), where everything is trained and N is 1.

Why N stands where it does:

- DDP: Lightning skips the exchange in all micro-batches but the last (`no_sync`).
- ZeRO-1 keeps whole gradients, so that the last micro-batch can exchange their sum. The optimizer
  updates a part of what is trained, and the parts are gathered.
- ZeRO-2 keeps a part of each gradient only, so that each micro-batch is exchanged. DeepSpeed does
  this by an all-reduce (`use_multi_rank_bucket_allreduce`, its default), not a reduce-scatter.
- FSDP2 and ZeRO-3 gather each layer, in the dtype that it is stored in, for the forward and again
  for the backward pass of each micro-batch. Lightning skips no exchange here. What is recomputed in
  the backward pass costs FSDP2 no third gathering, since the layer is gathered for the backward
  pass as a whole; u stays gathered from the one pass to the other.
- ZeRO-3 gathers each linear map for itself: once forward, once recomputed, once backward. DeepSpeed
  keeps some of them for the next use (`stage3_max_live_parameters`, `stage3_prefetch_bucket_size`,
  `stage3_max_reuse_distance`): 2.5 and 2.7 w were counted with these in the proportion that their
  defaults have to a 7B and a 70B Llama. Matrices of fewer than 100,000 entries are gathered once in
  a step (`stage3_param_persistence_threshold`). None of this is in the count, which is a bound.

Where each node has all parts (`replicate_nodes` of FSDP2), P is the processes of a node, and what a
process has of the gradients' sums, g / P, is summed over the R nodes by an all-reduce besides:
2 (g / P) N (R - 1) / R.

Verified, by counting the collectives of three CPU processes: all but ZeRO-3 to the byte
where P divides the rows of all matrices (FSDP2 and DeepSpeed fill up to that); ZeRO-3 as a bound.
Counted on paper: the ring, for NCCL; how many hosts a ring passes is not in it. Left out: what does
not grow with the model (sums of losses, gradient norms), buffers that DDP sends, and what DeepSpeed
moves between host and device.
"""

from dataclasses import dataclass, replace

from rslightning.memory import estimate_memory
from rslightning.model_shape import ModelShape
from rslightning.training_step import Sharding, TrainingStep


@dataclass(frozen=True)
class Communication:
    """Bytes that one process sends in an optimizer step.

    Attributes:
        gradients: To sum the gradients over the processes.
        weights: To gather what the processes keep parts of.
    """

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """Both."""
        return self.gradients + self.weights


def step_communication(
    shape: ModelShape, step: TrainingStep, micro_batches: int = 1
) -> Communication:
    """Count the bytes that each process sends in an optimizer step: see above.

    Args:
        shape: Sizes of the model.
        step: What a process computes on, in a micro-batch.
        micro_batches: Number of them in an optimizer step.
    """
    sharding = step.sharding
    whole = estimate_memory(shape, replace(step, sharding=Sharding(masters=sharding.masters)))
    sent = (sharding.parts - 1) / sharding.parts
    between_nodes = 2 * (sharding.replicas - 1) / sharding.replicas / sharding.parts
    gradients = whole.gradients * (sent * (1 if sharding.weights else 2) + between_nodes)
    weights = 0
    if sharding.weights:
        weights = _gathered_bytes(shape, step, whole.frozen + whole.trained) * micro_batches
    elif sharding.optimizer:
        weights = whole.trained
    return Communication(
        gradients=gradients * (micro_batches if sharding.gradients else 1),
        weights=sent * weights,
    )


def _gathered_bytes(shape: ModelShape, step: TrainingStep, weights: int) -> int:
    """Return the bytes that are gathered in a micro-batch."""
    if step.sharding.masters:
        return weights * (3 if step.activation_checkpointing else 2)
    rest = shape.final_norm + shape.tied * shape.embedding
    return 2 * weights - rest * step.base_bytes
