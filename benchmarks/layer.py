"""One adapted linear layer, forward and backward: this package against others, side by side.

    pip install peft litgpt torchtune torchao
    python benchmarks/layer.py [--dtype bfloat16] [--grid] [--contenders ours PEFT] [--repeats 5]
    python benchmarks/layer.py --orders [--dtype bfloat16] [--grid]
    python benchmarks/layer.py --device cuda --dtype bfloat16 --shape 16384 4096 4096 [--orders]

All have the same weights, input x and output gradient dy, and compute y and the gradients of x, A
and B. Before anything is timed these are compared with a dense float64 computation. Time is given
relative to the frozen layer alone (y and the gradient of x); contenders alternate, the median over
the rounds counts. `full` trains W instead of an adapter.

In bfloat16, `ours` and `PEFT` are what each package makes by itself: adapters in float32, ours
under autocast, PEFT's without. The `bf16` ones keep the adapters in bfloat16, too, as LitGPT and
torchtune do.

With --orders every order of the products is timed (see `rslightning/rslora/contraction.py`), and
the one that is chosen compared with the fastest.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from side_by_side import machine, ratio, time_in_turn, update_share, write_json
from torch import Tensor, nn

from rslightning.cost import ORDERS, LayerShape, Order
from rslightning.rslora import LoRALinear, scaling_factor
from rslightning.rslora.contraction import adapted_linear, choose_order
from rslightning.rslora.rounding import allow_merged_orders
from rslightning.rslora.spec import ResolvedAdapter

ALPHA = 16.0
UPDATE = 0.05  # ||gamma B A|| / ||W||
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative, of a whole matrix
PACKAGES = ("peft", "litgpt", "torchtune")


class Shape(NamedTuple):
    """Sizes of one measurement."""

    tokens: int
    in_features: int
    out_features: int
    rank: int


class Problem(NamedTuple):
    """The numbers that all contenders get; A and B are exact in the dtype of W.

    Shape:
        x [tokens, in], dy [tokens, out], weight [out, in], lora_a [rank, in], lora_b [out, rank].
    """

    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gamma: float


class Contender(NamedTuple):
    """A layer, and the parameters whose gradients it computes besides that of x."""

    layer: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...]
    autocast: bool = False


def draw(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    """Draw a layer with an adapter that is in the middle of its training."""
    torch.manual_seed(0)
    tokens, n, m, rank = shape
    gamma = scaling_factor(rank, ALPHA, "rslora")
    randn = partial(torch.randn, device=device)
    weight = randn(m, n).mul_(0.02)
    lora_a = torch.empty(rank, n, device=device).uniform_(-(n**-0.5), n**-0.5)
    lora_b = randn(m, rank)
    lora_b *= UPDATE / update_share(weight, lora_a, lora_b, gamma)
    tensors = (randn(tokens, n), randn(tokens, m), weight, lora_a, lora_b)
    return Problem(*(tensor.to(dtype) for tensor in tensors), gamma)


def base_layer(problem: Problem) -> nn.Linear:
    out_features, in_features = problem.weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    return layer


@torch.no_grad()
def with_adapter(
    layer: Any, lora_a: Tensor, lora_b: Tensor, problem: Problem, autocast: bool = False
) -> Contender:
    """Fill the matrices of `layer`."""
    lora_a.copy_(problem.lora_a)
    lora_b.copy_(problem.lora_b)
    return Contender(layer, (lora_a, lora_b), autocast)


def ours(problem: Problem, dtype: torch.dtype, autocast: bool = False) -> Contender:
    adapter = ResolvedAdapter(len(problem.lora_a), ALPHA, "rslora")
    layer = LoRALinear(base_layer(problem), adapter, dtype=dtype)
    contender = with_adapter(layer, layer.lora_a, layer.lora_b, problem, autocast)
    if problem.weight.dtype.itemsize == 2:
        allow_merged_orders(layer, problem.weight.dtype)  # measured now and then in a fit
    return contender


def peft(problem: Problem, float32_adapters: bool) -> Contender:
    from peft import LoraConfig, get_peft_model

    rank = len(problem.lora_a)
    config = LoraConfig(r=rank, lora_alpha=ALPHA, use_rslora=True, target_modules=["0"])
    model = nn.Sequential(base_layer(problem))
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=float32_adapters)
    layer = wrapped.base_model.model[0]
    matrices = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return with_adapter(layer, *matrices, problem)


def litgpt(problem: Problem) -> Contender:
    from litgpt.lora import LoRALinear as Layer

    out_features, in_features = problem.weight.shape
    layer = Layer(in_features, out_features, r=len(problem.lora_a), bias=False)
    layer.to(problem.weight.dtype).linear = base_layer(problem)
    layer.scaling = problem.gamma
    return with_adapter(layer, layer.lora_A, layer.lora_B, problem)


def torchtune(problem: Problem) -> Contender:
    from torchtune.modules.peft import LoRALinear as Layer

    rank, (out_features, in_features) = len(problem.lora_a), problem.weight.shape
    layer = Layer(in_features, out_features, rank, alpha=problem.gamma * rank)
    layer.to(problem.weight.dtype).weight = base_layer(problem).weight
    return with_adapter(layer, layer.lora_a.weight, layer.lora_b.weight, problem)


def full(problem: Problem) -> Contender:
    layer = base_layer(problem).requires_grad_()
    return Contender(layer, (layer.weight,))


Build = Callable[[Problem], Contender]


def builders(dtype: torch.dtype) -> dict[str, Build]:
    """Return name -> how to build the contender, those that have an adapter."""
    if dtype == torch.float32:
        mine: dict[str, Build] = {
            "ours": partial(ours, dtype=dtype),
            "PEFT": partial(peft, float32_adapters=True),
        }
    else:
        mine = {
            "ours": partial(ours, dtype=torch.float32, autocast=True),
            "ours bf16": partial(ours, dtype=dtype),
            "PEFT": partial(peft, float32_adapters=True),
            "PEFT bf16": partial(peft, float32_adapters=False),
        }
    return mine | {"LitGPT": litgpt, "torchtune": torchtune}


def build(problem: Problem, wanted: list[str] | None) -> dict[str, Contender]:
    """Return the contenders with an adapter, or some of them, whose packages are there."""
    built = {}
    for name, make in builders(problem.weight.dtype).items():
        if wanted and name not in wanted:
            continue
        try:
            built[name] = make(problem)
        except ImportError:
            continue
    return built


def results(contender: Contender, problem: Problem) -> list[Tensor]:
    """Return y and the gradients of x and of what the contender trains."""
    x = problem.x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=contender.autocast):
        y = contender.layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *contender.trained], problem.dy)]


def truth(problem: Problem) -> list[Tensor]:
    """Return y and the gradients of x, A and B, dense and in float64."""
    x, a, b = (
        tensor.double().requires_grad_() for tensor in (problem.x, problem.lora_a, problem.lora_b)
    )
    y = F.linear(x, problem.weight.double() + problem.gamma * (b @ a))
    return [y.detach(), *torch.autograd.grad(y, [x, a, b], problem.dy.double())]


def check(contenders: dict[str, Contender], problem: Problem) -> None:
    """Stop the program if a contender computes something else."""
    expected, tolerance = truth(problem), TOLERANCE[problem.weight.dtype]
    for name, contender in contenders.items():
        found = results(contender, problem)
        for what, mine, true in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
            error = float((mine.double() - true).norm() / true.norm())
            if not error < tolerance:
                raise SystemExit(f"{name}: {what} differs by {error:.1e}; nothing was compared.")


def compare(
    shape: Shape, problem: Problem, repeats: int, wanted: list[str] | None = None
) -> dict[str, Any]:
    """Return the time of the frozen layer, and each contender's relative to it."""
    contenders = build(problem, wanted)
    check(contenders, problem)
    contenders = {"frozen": Contender(base_layer(problem), ())} | contenders
    if not wanted or "full" in wanted:
        contenders["full"] = full(problem)
    return measure(shape, contenders, problem, repeats)


def measure(
    shape: Shape, contenders: dict[str, Contender], problem: Problem, repeats: int
) -> dict[str, Any]:
    """Return the shape, the time of the frozen layer, and the others' relative to it."""
    runs = {name: partial(results, each, problem) for name, each in contenders.items()}
    times = time_in_turn(runs, repeats)
    relative = {name: ratio(times, name, "frozen") for name in runs if name != "frozen"}
    return shape._asdict() | {
        "frozen_seconds": statistics.median(times["frozen"]),
        "relative": relative,
    }


def order_name(order: Order) -> str:
    """Return how y, dx, and dA with dB are computed, in three words."""
    words = (("split", "merged"), ("split", "merged"), ("low", "full"))
    return "/".join(pair[choice] for pair, choice in zip(words, order, strict=True))


def compare_orders(shape: Shape, problem: Problem, repeats: int) -> dict[str, Any]:
    """Return the time of each order relative to the frozen layer, and the one that is chosen."""
    a, b = (each.float().requires_grad_() for each in (problem.lora_a, problem.lora_b))

    def layer(x: Tensor, order: Order) -> Tensor:
        return adapted_linear(x, problem.weight, None, a, b, problem.gamma, order=order)

    contenders = {order_name(o): Contender(partial(layer, order=o), (a, b)) for o in ORDERS}
    check(contenders, problem)
    sizes = LayerShape(shape.in_features, shape.out_features, shape.rank, shape.tokens)
    chosen = choose_order(sizes)
    contenders["frozen"] = Contender(base_layer(problem), ())
    return measure(shape, contenders, problem, repeats) | {"chosen": order_name(chosen)}


def sizes(options: argparse.Namespace) -> Iterator[Shape]:
    """Yield what to measure."""
    shapes = options.shape or [(4096, 2048, 2048)]
    if options.grid:
        widths = [(512, 512), (1024, 1024), (2048, 2048), (2048, 5632)]
        shapes = [(tokens, *width) for width in widths for tokens in (512, 1024, 2048, 4096)]
    for tokens, n, m in shapes:
        powers = [2**power for power in range(2, 12) if 2**power <= min(n, m)]
        for rank in options.ranks or (powers if options.grid else (4, 128, 512, 2048)):
            yield Shape(tokens, n, m, rank)


def report(row: dict[str, Any], first: bool) -> None:
    """Print the ratios of one shape, under a head if it is the first."""
    if first:
        head = "".join(f"{name:>6}" for name in ("T", "in", "out", "r"))
        print(f"{head}{'frozen ms':>11}" + "".join(f"{name:>11}" for name in row["relative"]))
    sizes = "".join(f"{row[name]:>6}" for name in Shape._fields)
    ratios = "".join(f"{each:>11.2f}" for each in row["relative"].values())
    print(f"{sizes}{1e3 * row['frozen_seconds']:>11.2f}{ratios}", flush=True)


def report_order(row: dict[str, Any], first: bool) -> None:
    """Print the chosen and the fastest order of one shape."""
    if first:
        head = "".join(f"{name:>6}" for name in ("T", "in", "out", "r"))
        print(f"{head}{'chosen':>21}{'of frozen':>11}{'fastest':>21}{'of frozen':>11}{'ratio':>7}")
    sizes = "".join(f"{row[name]:>6}" for name in Shape._fields)
    relative, chosen = row["relative"], row["chosen"]
    fastest = min(relative, key=relative.__getitem__)
    print(
        f"{sizes}{chosen:>21}{relative[chosen]:>11.2f}{fastest:>21}{relative[fastest]:>11.2f}"
        f"{relative[chosen] / relative[fastest]:>7.2f}",
        flush=True,
    )


def against_best(row: dict[str, Any]) -> dict[str, float]:
    """Return ours by the fastest peer with an adapter, or the chosen order by the fastest one."""
    relative = row["relative"]
    if "chosen" in row:
        return {"chosen": relative[row["chosen"]] / min(relative.values())}
    mine = [name for name in relative if name.startswith("ours")]
    fastest = min(relative[name] for name in relative if name not in (*mine, "full"))
    return {name: relative[name] / fastest for name in mine}


def summarize(rows: list[dict[str, Any]]) -> None:
    """Print the median and the worst over all shapes."""
    for name in against_best(rows[0]):
        found = [against_best(row)[name] for row in rows]
        worst = rows[found.index(max(found))]
        sizes = ", ".join(f"{field} {worst[field]}" for field in Shape._fields)
        print(
            f"{name} by the fastest, {len(rows)} shapes: median {statistics.median(found):.2f}, "
            f"at most {max(found):.2f} ({sizes})"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grid", action="store_true", help="all shapes instead of one")
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("T", "IN", "OUT"))
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--contenders", nargs="+", help="some instead of all")
    parser.add_argument("--orders", action="store_true", help="our orders, no peers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    where = machine(*PACKAGES, device=options.device)
    print(f"{where}\n{options.dtype}, {options.repeats} rounds, time relative to the frozen layer")
    run, show = (compare_orders, report_order) if options.orders else (compare, report)
    run = run if options.orders else partial(compare, wanted=options.contenders)
    rows: list[dict[str, Any]] = []
    for shape in sizes(options):
        problem = draw(shape, getattr(torch, options.dtype), options.device)
        rows.append(run(shape, problem, options.repeats))
        show(rows[-1], first=len(rows) == 1)
    summarize(rows)
    write_json(options.json, {"machine": where, "dtype": options.dtype, "rows": rows})


if __name__ == "__main__":
    main()
