"""The text of a plan says what the plan computes, within 100 columns."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_plan import LLAMA, settings

from rslightning.cost import GIB
from rslightning.plan import read_plan
from rslightning.plan_text import STRATEGIES, describe_plan
from rslightning.training_step import Optimizer, Sharding, quantized_bytes, step_operations

FRAGMENTS = Path(__file__).parents[1] / "configs" / "strategy"


def fragment(name):
    """Return the strategy of a fragment."""
    text = (FRAGMENTS / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["trainer"]["strategy"]


@pytest.fixture
def make(tmp_path):
    """Return a factory of plans for Llama-2-7B."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")

    def make_plan(devices=None, **changes):
        return read_plan(settings(tmp_path, **changes), devices)

    return make_plan


def rows(text):
    return [
        re.split(r"\s+", line.strip(" >")) for line in text if re.match(r"^[ >]*\d+ .*\.", line)
    ]


def test_a_row_for_each_rank(make):
    plan = make(rank=48)
    lines = list(describe_plan(plan, 80 * GIB))
    table = {int(row[0]): row[1:] for row in rows(lines) if len(row) > 8}
    assert list(table) == [4, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048]
    for rank, cells in table.items():
        estimate = plan.memory(rank)
        parts = [f"{size / GIB:.2f}" for size in (*estimate.parts().values(), estimate.total)]
        assert cells[: len(parts)] == parts
        assert ("fits" in cells) == (estimate.total <= 72 * GIB)
        cost = step_operations(plan.shape, plan.at(rank))
        assert cells[-1] == f"{cost / step_operations(plan.shape, plan.at(4)):.2f}"
    head = next(line for line in lines if "frozen" in line)
    assert head.split() == ["rank", *plan.memory(4).parts(), "peak", "ops"]
    (marked,) = [line for line in lines if re.match(r"^ *> \d", line)]
    assert marked.split()[:2] == [">", "48"]


def test_the_highest_rank_is_named(make):
    plan = make()
    memory = int(plan.memory(256).total / 0.9) + 9
    peak = f"{plan.memory(256).total / GIB:.2f} GiB"
    assert any(
        line.startswith("Highest rank that fits ") and line.endswith(f": 256 ({peak}).")
        for line in describe_plan(plan, memory)
    )
    assert any(line.startswith("No rank fits 0.90 GiB") for line in describe_plan(plan, GIB))


def switches(plan, memory):
    lines = list(describe_plan(plan, memory))
    if "What would raise it, each by itself:" not in lines:
        return {}
    start = lines.index("What would raise it, each by itself:") + 1
    return {option: int(rank) for rank, option in (x.split(maxsplit=1) for x in lines[start:])}


def test_every_switch_gives_the_rank_of_the_plan_with_it(make):
    changes = {"activation_checkpointing": False, "dtype": "float32", "precision": "32-true"}
    plan = make(**changes)
    memory = int(plan.memory(4).total / 0.9) + 9
    step = plan.step
    changed = {
        "--model.activation_checkpointing true": replace(step, activation_checkpointing=True),
        "--data.batch_size 1 --trainer.accumulate_grad_batches 32": replace(step, rows=1),
        "--model.dtype bfloat16 --trainer.precision bf16-mixed": replace(
            step, base_bytes=2, compute_bytes=2
        ),
        "--config configs/quantization/nf4.yaml": replace(
            step,
            map_bytes=quantized_bytes({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ),
        "--model.optimizer bitsandbytes.optim.AdamW8bit": replace(
            step, optimizer=Optimizer("AdamW8bit")
        ),
        "--config configs/strategy/deepspeed_zero3_offload.yaml": replace(
            step,
            sharding=Sharding(
                **dict.fromkeys(("optimizer", "gradients", "weights", "masters"), True),
                optimizer_on_host=True,
                weights_on_host=True,
            ),
        ),
    }
    expected = {
        option: replace(plan, step=other).highest_rank(memory * 0.9)
        for option, other in changed.items()
    }
    found = switches(plan, memory)
    assert found == {option: rank for option, rank in expected.items() if rank > 4}
    assert {"--model.activation_checkpointing true", "--config configs/quantization/nf4.yaml"} <= {
        *found
    }
    assert list(found.values()) == sorted(found.values(), reverse=True)


def fragments(plan, rank):
    """Return the strategies that are proposed where a rank just fits."""
    found = switches(plan, int(plan.memory(rank).total / 0.9) + 9)
    return {option.split("/")[-1] for option in found if "configs/strategy" in option}


def test_one_device_shares_with_the_host_alone(make):
    assert fragments(make(), 256) == {"deepspeed_zero3_offload.yaml"}
    assert fragments(make(strategy=fragment("deepspeed_zero3_offload")), 256) == set()


def test_several_devices_share_among_each_other(make):
    offload = "deepspeed_zero3_offload.yaml"
    shared = {"deepspeed_zero1.yaml", "deepspeed_zero2.yaml", "fsdp2.yaml", offload}
    assert fragments(make(devices=8), 256) == shared
    first = make(devices=8, strategy=fragment("deepspeed_zero1"))
    assert fragments(first, 256) == {"fsdp2.yaml", offload}  # a part of the gradients is too little
    assert fragments(make(devices=8, strategy=fragment("fsdp2")), 64) == {offload}
    assert fragments(make(devices=8, strategy="deepspeed_stage_3"), 64) == {offload}


def test_a_quantized_base_is_not_shared_out(make):
    quantized = make(devices=8, quantization={"load_in_4bit": True})
    assert fragments(quantized, 256) == {"deepspeed_zero1.yaml", "deepspeed_zero2.yaml"}
    sharded = make(devices=8, strategy=fragment("fsdp2"))
    assert not any("nf4" in x for x in switches(sharded, int(sharded.memory(64).total / 0.9) + 9))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_proposed_fragment_is_there(name):
    kind, options = STRATEGIES[name]
    strategy = {"class_path": f"rslightning.strategies.{kind}", "init_args": options}
    assert {"init_args": {}} | fragment(name) == strategy


def test_what_is_already_on_is_no_switch(make):
    quantized = make(quantization={"load_in_4bit": True}, batch_size=1)
    found = switches(quantized, int(quantized.memory(64).total / 0.9) + 9)
    assert not any("nf4" in option or "batch_size" in option for option in found)
    assert not any("checkpointing" in option for option in found)


def test_full_fine_tuning_is_one_row(make):
    lines = list(describe_plan(make(adapter=None), 80 * GIB))
    assert lines[0].endswith("6,738,415,616 parameters, full fine-tuning")
    assert sum(line.strip().startswith("full ") for line in lines) == 1
    assert lines[-1].startswith("It fits 72.00 GiB")
    assert list(describe_plan(make(adapter=None), 20 * GIB))[-1].startswith("It does not fit 18.00")


def test_the_hosts_part_is_told(make):
    lines = list(describe_plan(make(strategy="deepspeed_stage_2_offload"), 80 * GIB))
    host = make(strategy="deepspeed_stage_2_offload").memory(64).host
    assert f"At rank 64, {host / GIB:.2f} GiB are in the host's memory." in lines


def test_a_guess_is_called_so(make):
    plan = make(optimizer={"class_path": "somewhere.Sophia"})
    line = "The state of Sophia is a guess: two numbers for each entry."
    assert line in list(describe_plan(plan, 80 * GIB))
    assert not any(" is a guess" in text for text in describe_plan(make(), 80 * GIB))


@pytest.mark.parametrize("memory", [GIB, 24 * GIB, 80 * GIB, 4000 * GIB])
def test_lines_are_short(make, memory):
    for plan in (make(), make(adapter=None), make(devices=64, batch_size=128)):
        plan = replace(plan, base_model="meta-llama/Llama-2-7b-hf")
        assert max(map(len, describe_plan(plan, memory))) <= 100
