"""What holds for all shapes and states, tried on random ones; the same ones each time."""

import copy
import itertools
import json
import math
import os
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rslightning.checkpoint_folder import newest_whole, point_last, step_name
from rslightning.data.build import Encoding
from rslightning.data.loader import OrderedLoader
from rslightning.data.packing import pack
from rslightning.data.rows import Rows
from rslightning.data.stream import ChunkReader, StreamLoader
from rslightning.data.tokenizer import load_tokenizer
from rslightning.errors import UserError
from rslightning.rslora.adapters import collect_adapter
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.merge import merge_adapters, unmerge_adapters
from rslightning.rslora.peft_format import read_adapter, write_adapter
from rslightning.rslora.spec import AdapterSpec

EXPONENT = {"lora": 1.0, "rslora": 0.5, "quarter_root": 0.25, "inverse_square": 2.0, "unit": 0.0}

often = settings(deadline=None, derandomize=True, database=None, max_examples=60)
seldom = settings(often, max_examples=20)

sizes = st.integers(1, 40)
ranks = st.integers(1, 48)  # above the width, too
alphas = st.floats(0.01, 1000)
scalings = st.sampled_from(sorted(EXPONENT))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@contextmanager
def folder():
    """A folder of its own for each try: a fixture's would be that of all tries."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def stacks(draw):
    """Draw linear maps of random widths, one after the other, some of them stored as [in, out]."""
    widths = draw(st.lists(sizes, min_size=2, max_size=5))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    maps = []
    for inside, outside in itertools.pairwise(widths):
        if draw(st.booleans()):
            maps.append(Conv1D(outside, inside))
        else:
            maps.append(nn.Linear(inside, outside, bias=draw(st.booleans())))
    return nn.Sequential(*maps)


def dense(layer, x, exponent, alpha, rank):
    """Return W x + b + alpha / rank^exponent B A x, in float64 and as it is written."""
    base = layer.base
    weight = base.weight.double().T if isinstance(base, Conv1D) else base.weight.double()
    update = layer.lora_b.double() @ layer.lora_a.double()
    y = x @ (weight + alpha / rank**exponent * update).T
    return y if base.bias is None else y + base.bias.double()


# --- injection and merging ------------------------------------------------------------------------


@often
@given(stacks(), ranks, alphas, scalings, st.integers(1, 9))
def test_injection(model, rank, alpha, scaling, rows):
    x = torch.randn(rows, next(model.parameters()).shape[0 if type(model[0]) is Conv1D else 1])
    before = model(x)
    report = inject_adapters(model, AdapterSpec(rank, alpha, scaling, targets=r"\d+"))
    layers = dict(adapter_layers(model))
    assert list(layers) == [str(number) for number in range(len(model))]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.lora_{matrix}" for path in layers for matrix in "ab"}
    count = sum(rank * (layer.in_features + layer.out_features) for layer in layers.values())
    assert report.trainable_parameters == count
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)  # B is 0

    y = x.double()
    for layer in layers.values():
        nn.init.normal_(layer.lora_b, std=0.1 * rank ** EXPONENT[scaling] / alpha)
        y = dense(layer, y, EXPONENT[scaling], alpha, rank)
    error = 1e-4 * (1 + y.abs().max().item())
    torch.testing.assert_close(model(x).double(), y, rtol=1e-4, atol=error)


@often
@given(stacks(), ranks, alphas, scalings, dtypes, dtypes)
def test_merging(model, rank, alpha, scaling, dtype, adapter_dtype):
    model.to(dtype)
    spec = AdapterSpec(rank, alpha, scaling, targets=r"\d+")
    inject_adapters(model, spec, dtype=adapter_dtype)
    expected, before = {}, {}
    for path, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_b, std=0.1 * rank ** EXPONENT[scaling] / alpha)
        before[path] = layer.base.weight.clone()
        update = layer.lora_b.double() @ layer.lora_a.double() * (alpha / rank ** EXPONENT[scaling])
        exact = before[path].double() + (update.T if isinstance(layer.base, Conv1D) else update)
        # The products are summed in float32, and the sum is rounded once.
        magnitudes = (layer.lora_b.double().abs() @ layer.lora_a.double().abs()).max()
        summed = (rank + 3) * 2**-24 * (alpha / rank ** EXPONENT[scaling]) * magnitudes
        rounded = exact.abs() * torch.finfo(dtype).eps / 2 * (1 + 1e-3)
        expected[path] = exact, rounded + summed + 2**-24 * exact.abs() + 1e-30
    assert merge_adapters(model) == list(expected)
    for path, layer in adapter_layers(model):
        exact, error = expected[path]
        assert layer.merged
        assert layer.base.weight.dtype == dtype
        assert bool(((layer.base.weight.double() - exact).abs() <= error).all())
    assert merge_adapters(model) == []
    assert unmerge_adapters(model) == list(expected)
    for path, layer in adapter_layers(model):
        assert torch.equal(layer.base.weight, before[path])


# --- PEFT's format --------------------------------------------------------------------------------


@st.composite
def llamas(draw):
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=draw(st.integers(5, 30)),
            hidden_size=4 * heads * draw(st.integers(1, 3)),
            intermediate_size=draw(st.integers(1, 30)),
            num_hidden_layers=draw(st.integers(1, 3)),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=16,
        )
    )


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
targets = st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=7, unique=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@seldom
@given(llamas(), ranks, alphas, st.sampled_from(["lora", "rslora"]), targets, st.data())
def test_peft_reads_what_was_trained(model, rank, alpha, scaling, names, data):
    base = copy.deepcopy(model).eval()
    other_rank = data.draw(st.dictionaries(st.sampled_from(names), ranks, max_size=2))
    other_alpha = data.draw(st.dictionaries(st.sampled_from(names), alphas, max_size=2))
    inject_adapters(
        model, AdapterSpec(rank, alpha, scaling, names, 0.0, "gaussian", other_rank, other_alpha)
    )
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_b, std=0.1)
    ids = torch.arange(8).remainder(base.config.vocab_size).reshape(2, 4)
    adapter = collect_adapter(model, "some/base")
    with folder() as place:
        write_adapter(adapter, place / "adapter")
        again = read_adapter(place / "adapter")
        theirs = PeftModel.from_pretrained(base, place / "adapter").eval()
        expected = theirs(ids).logits
    assert again.layers.keys() == adapter.layers.keys()
    for path, layer in adapter.layers.items():
        assert torch.equal(again.layers[path].lora_a, layer.lora_a)
        assert torch.equal(again.layers[path].lora_b, layer.lora_b)
        assert again.layers[path].numbers == layer.numbers
    error = 1e-4 * (1 + expected.abs().max().item())
    torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-3, atol=error)


# --- packing and loading --------------------------------------------------------------------------


@often
@given(st.integers(1, 200), st.data())
def test_packing(block_length, data):
    lengths = data.draw(st.lists(st.integers(1, block_length), max_size=80))
    blocks = pack(lengths, block_length)
    assert sorted(index for block in blocks for index in block) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in block) for block in blocks]
    assert all(0 < fill <= block_length for fill in fills)
    assert sum(2 * fill <= block_length for fill in fills) <= 1  # two of them would be one block
    assert len(blocks) >= math.ceil(sum(lengths) / block_length)


def read_in_parts(make, parts, total, limit=math.inf):
    """Return the first batches of a loader that is lost, and made anew, after each part.

    As a Trainer does, which counts the batches of a pass and ends it after `limit`.
    """
    state, found, in_pass = None, [], 0
    for part in itertools.chain(parts, [total]):
        loader = make()
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        left = min(part, total - len(found))
        while left > 0:
            for batch in loader:
                found.append(batch)
                state, left, in_pass = loader.state_dict(), left - 1, in_pass + 1
                if not left or in_pass == limit:
                    break
            else:
                in_pass = 0
            in_pass %= limit
    return found


parts = st.lists(st.integers(1, 12), max_size=4)
limits = st.one_of(st.just(math.inf), st.integers(1, 9))


@pytest.fixture(scope="module")
def encoding(model_folder):
    tokenizer = load_tokenizer(str(model_folder))

    def make(packing):
        return Encoding(
            tokenizer,
            lambda row: [("", row["text"])],
            columns=("text",),
            optional_columns=(),
            templated=False,
            max_length=24,
            packing=packing,
            train_on_prompt=False,
            skip_bad_rows=False,
        )

    return make


@often
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 3), st.booleans(), parts, limits)
@example(7, 2, 1, True, [4, 1], math.inf)  # it is lost where a pass ends
@example(7, 2, 1, True, [3, 1], 3)  # and where a limit ends it
def test_a_loader_that_is_lost(rows, batch, world_size, shuffle, lost_after, limit):
    each = min(limit, math.ceil(rows / (batch * world_size)))  # batches of a pass
    of_process = []
    for rank in range(world_size):
        options = {"shuffle": shuffle, "seed": 3, "rank": rank, "world_size": world_size}
        options |= {"limit": lambda: limit}
        make = partial(OrderedLoader, range(rows), batch, lambda rows, _: rows, **options)
        whole = read_in_parts(make, [], 3 * each, limit)
        assert read_in_parts(make, lost_after, 3 * each, limit) == whole
        of_process.append(whole)
    for number in range(3):
        batches = [b for found in of_process for b in found[number * each : (number + 1) * each]]
        seen = [row for batch in batches for row in batch if row is not None]
        assert len(set(seen)) == len(seen)
        if each < limit:
            assert sorted(seen) == list(range(rows))


@seldom
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4), st.booleans(), parts, limits)
def test_a_stream_that_is_lost(encoding, rows, chunk, batch, packing, lost_after, limit):
    with folder() as place:
        lines = [{"text": " ".join("abcdefgh"[: 1 + n % 8])} for n in range(rows)]
        path = place / "rows.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        reader = ChunkReader(Rows([path], True, "line"), encoding(packing), chunk_rows=chunk)

        def make():
            return StreamLoader(reader, batch, lambda blocks, _: ids(blocks), limit=lambda: limit)

        def ids(blocks):
            return [block.input_ids.tolist() for block in blocks]

        whole = read_in_parts(make, [], 25, limit)
        assert read_in_parts(make, lost_after, 25, limit) == whole


# --- checkpoints ----------------------------------------------------------------------------------

saves = st.lists(
    st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), min_size=1, max_size=6
)


@often
@given(saves)
@example([(10, True, True), (5, True, True), (5, False, False)])  # a run that went back
def test_the_newest_whole_checkpoint(history):
    """Each save is (step, whether it is whole, whether the link followed)."""
    with folder() as place:
        written = {}  # step -> (when, whole)
        linked = None
        for when, (step, whole, follows) in enumerate(history):
            path = place / step_name(step)
            torch.save({"step": step, "when": when}, path)
            if not whole:
                os.truncate(path, path.stat().st_size // 2)
            os.utime(path, (1000 + 2 * when, 1000 + 2 * when))
            written[step] = when, whole
            if follows:
                point_last(place, step)
                times = (1001 + 2 * when, 1001 + 2 * when)
                os.utime(place / "last.ckpt", times, follow_symlinks=False)
                linked = when, step
        if linked is None:  # the link was never made: the highest step is the newest
            allowed = written
        else:  # what was saved after it, and what it goes on from
            allowed = {s: w for s, w in written.items() if w[0] > linked[0] or s <= linked[1]}
        sound = [step for step, (_, whole) in allowed.items() if whole]
        if not sound:
            with pytest.raises(UserError):
                newest_whole(place)
            return
        path, damaged = newest_whole(place)
        assert path == place / step_name(max(sound))
        assert len(damaged) == sum(step > max(sound) for step in allowed)
