"""How gamma_r B A x is computed and added to the frozen output.

For T tokens the usual order, A first and then B, costs 2 T r (in + out) operations; gamma_r is
folded into the product with A, the smaller of the two activations whenever r < out.
"""

import torch.nn.functional as F
from torch import Tensor


def add_adapter(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, gamma: float) -> Tensor:
    """Return `y + gamma B A x`.

    The float32 adapter is cast to the dtype of the activation `x` (which is the compute dtype of
    the layer; the base may be stored in 4 bit), multiplied there, and its gradient cast back.

    Shape:
        y [..., out], x [..., in], lora_a [rank, in], lora_b [out, rank] -> [..., out].
    """
    down = F.linear(x, lora_a.to(x.dtype)) * gamma
    return y + F.linear(down, lora_b.to(down.dtype)).to(y.dtype)
