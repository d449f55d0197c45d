"""`docs/scaling.md` shows what `benchmarks/scaling.py` prints, and that counts what it says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

from rslightning.cost import GIB

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def load_benchmark():
    path = ROOT / "benchmarks" / "scaling.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_scaling", path)
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()


@pytest.fixture(scope="module")
def printed():
    return list(BENCHMARK.lines())


def test_the_page_shows_the_tables(printed):
    shown = re.search(r"<!-- scaling:begin -->\n(.*)<!-- scaling:end -->", PAGE, re.DOTALL)[1]
    assert shown.strip().splitlines() == "\n".join(printed).strip().splitlines()


def test_tables_are_tables(printed):
    columns = [line.count("|") for line in printed if line.startswith("|")]
    starts = [index for index, line in enumerate(printed) if line.startswith("###")]
    assert len(starts) == 6
    assert len(columns) > 60
    for start, end in zip(starts, [*starts[1:], len(printed)], strict=True):
        table = [line.count("|") for line in printed[start:end] if line.startswith("|")]
        assert len({*table}) == 1


def cells(printed, title, gpus, fragment):
    start = next(index for index, line in enumerate(printed) if line.startswith(f"### {title}"))
    row = next(x for x in printed[start:] if x.startswith(f"| {gpus} | `{fragment}` |"))
    return [cell.strip() for cell in row.strip("|").split("|")][2:]


def test_memory_is_the_sum_of_what_can_be_counted_by_hand(printed):
    base, layers, tokens = 6_738_415_616, 32, 8 * 512
    for rank, cell in zip(
        (16, 256), cells(printed, "Llama-2-7B: GiB on", 1, "single"), strict=False
    ):
        adapters = layers * rank * (4 * 2 * 4096 + 3 * (4096 + 11008))
        kept = 2 * base + (4 + 8) * adapters + max(4 * adapters, layers * tokens * 4096 * 2)
        assert 0 < float(cell) - kept / GIB < 2  # a layer's recomputation, and logits
    shared = cells(printed, "Llama-2-7B: GiB on", 8, "fsdp2")
    alone = cells(printed, "Llama-2-7B: GiB on", 1, "single")
    adapters = layers * 256 * (8 * 4096 + 3 * 15104)
    divided = (2 * base + 12 * adapters) / GIB
    gathered = 2 * (2 * base + 4 * adapters) / layers / GIB
    inputs = layers * tokens * 4096 * 2  # of the layers; gradients come in their place
    less = (max(4 * adapters, inputs) - max(4 * adapters / 8, inputs)) / GIB
    expected = float(alone[1]) - divided * 7 / 8 - less + gathered
    assert float(shared[1]) == pytest.approx(expected, abs=0.15)


def test_marks_and_ranks_agree(printed):
    rows = [line for line in printed if line.count("|") == 9 and "`" in line]
    assert len(rows) == 2 * (2 + 6 + 6)
    for row in rows:
        *needed, _, small, large = [cell.strip() for cell in row.strip("|").split("|")][2:]
        marks = [cell.count("*") for cell in needed]
        for highest, allowed in ((small, 0), (large, 1)):
            fitting = [r for r, n in zip(BENCHMARK.RANKS, marks, strict=True) if n <= allowed]
            assert max(fitting, default=0) <= (0 if highest == "none" else int(highest))
        for cell, count in zip(needed, marks, strict=True):
            size = float(cell.rstrip("*\\")) * GIB / 0.9
            assert count == (size > 80e9) + (size > 141e9)


def test_the_highest_rank_is_the_plans():
    plan = BENCHMARK.make_plan("Llama-2-70B", "fsdp2", 8)
    needed = {rank: plan.memory(rank) for rank in plan.candidates}
    for budget in (20e9, *BENCHMARK.budgets()):
        assert BENCHMARK.highest_rank(needed, budget) == str(plan.highest_rank(budget) or "none")


def test_a_step_takes_its_operations_and_its_bytes(printed):
    base, tokens = 6_738_415_616 - 32_000 * 4096, 8 * 512
    compute, sending, larger, total = map(
        float, cells(printed, "Llama-2-7B: seconds", 8, "fsdp2")[0].split(" / ")
    )
    # Forward, again, and the gradient of the input; adapters and attention are the rest.
    assert compute == pytest.approx(3 * 2 * tokens * base / (0.4 * 989e12), rel=0.05)
    assert sending == pytest.approx(7 / 8 * 2 * 2 * base / 450e9, rel=0.1)
    assert larger == compute
    assert total == pytest.approx(compute + sending, abs=0.011)


def test_links():
    found = [BENCHMARK.link_bandwidth(gpus) for gpus in (1, 8, 64)]
    assert found == [450e9, 450e9, 8 * 400e9 / 8]


@pytest.mark.parametrize("name", BENCHMARK.STRATEGIES)
def test_strategies_are_those_of_the_fragments(name):
    text = (ROOT / "configs" / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
    strategy = yaml.safe_load(text)["trainer"]["strategy"]
    path, options = BENCHMARK.STRATEGIES[name]
    if isinstance(strategy, str):
        assert (strategy, {}) == (path, options)
    else:
        assert (strategy["class_path"], strategy.get("init_args", {})) == (path, options)


def test_every_fragment_is_on_the_page():
    names = {path.stem for path in (ROOT / "configs" / "strategy").glob("*.yaml")}
    assert names == {*BENCHMARK.STRATEGIES}
    decisions = PAGE[: PAGE.index("## Tables")]
    assert names <= {*re.findall(r"`(\w+)`", decisions)}


def test_paths_on_the_page_exist():
    paths = re.findall(r"(?:rslightning|benchmarks|tests|configs)/[\w/]+\.(?:py|yaml)", PAGE)
    assert len(paths) > 6
    for path in paths:
        assert (ROOT / path).exists() or path.endswith("NAME.yaml"), path
