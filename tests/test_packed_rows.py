import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from transformers import AutoConfig, AutoModelForCausalLM

from rslightning.batch import IGNORED, Batch
from rslightning.errors import UserError
from rslightning.output_head import logits_are_of_head
from rslightning.packed_rows import keeps_examples_apart

VOCABULARY = 61
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

APART = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gemma2": {**LLAMA, "head_dim": 8},
    "mixtral": {**LLAMA, **EXPERTS},
}
TOGETHER = {
    "falcon": {**SIZES, "alibi": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": STATE,
    "recurrent_gemma": {**SIZES, "intermediate_size": 48, "attention_window_size": 8},
}


def build(name, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **ids, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", APART)
def test_examples_that_are_apart(name, dtype):
    assert keeps_examples_apart(build(name, dtype, **APART[name]).train())


@pytest.mark.filterwarnings("ignore:.*fast path is not available.*")
@pytest.mark.parametrize("name", TOGETHER)
def test_examples_that_see_each_other(name):
    model = build(name, **TOGETHER[name]).train()
    assert not keeps_examples_apart(model)
    assert model.training


def test_experts_that_round_to_16_bit_as_they_compute():
    """As under `bf16-mixed`, where the weights are in 32 bit."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    model = build("mixtral", **LLAMA | EXPERTS | wide | {"num_local_experts": 8})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert keeps_examples_apart(model)


def test_logits_that_tell_nothing_are_no_reason_to_refuse():
    model = build("llama", **LLAMA)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert keeps_examples_apart(model)


def test_parts_in_evaluation_stay_so():
    model = build("llama", **LLAMA).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert keeps_examples_apart(model)
    assert [module.training for module in model.modules()] == before


def test_a_base_that_would_mix_examples_is_refused(
    make_trainer, make_module, make_data, model_folder, tmp_path
):
    sizes = {**TOGETHER["falcon"], "vocab_size": 301}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes)).save_pretrained(
        tmp_path / "falcon"
    )

    def fit(**options):
        trainer = make_trainer(max_steps=1, limit_val_batches=0)
        trainer.fit(make_module(tmp_path / "falcon"), make_data(**options))
        return trainer.global_step

    with pytest.raises(UserError) as caught:
        fit(packing=True)
    assert str(caught.value).startswith("In FalconForCausalLM an example reads those before it in ")
    assert str(caught.value).endswith(": set data.packing to false.")
    assert fit(packing=False) == 1


def attention(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
    """What the `flash_attn_func` of flash-attn returns, [B, T, heads, width] as its arguments."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return y.transpose(1, 2)


def attention_of_parts(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """What its `flash_attn_varlen_func` returns: each part by itself, [tokens, heads, width]."""
    ends = cu_seqlens_q.tolist()
    assert ends == cu_seqlens_k.tolist()
    parts = [slice(*each) for each in itertools.pairwise(ends)]
    return torch.cat([attention(q[None, p], k[None, p], v[None, p], **options)[0] for p in parts])


@pytest.fixture
def flash_attention(monkeypatch):
    """transformers believes that flash-attn is there; its functions are computed by torch."""

    class Arguments(list):
        """transformers 5.23 takes a pair of functions, those before it one."""

        def __call__(self, *_, is_causal=True, softmax_scale=None, **__) -> dict:
            return {"causal": is_causal, "softmax_scale": softmax_scale}

    functions = (attention, attention_of_parts, None, None, None)
    arguments = Arguments([Arguments()] * 2)
    monkeypatch.setattr(
        flash_utils, "lazy_import_flash_attention", lambda *_, **__: (functions, arguments)
    )


def rows_of(*rows, width) -> Batch:
    """Return packed rows of examples, padded on the right."""

    def row(examples):
        ids = torch.cat(examples)
        labels = torch.cat([F.pad(each[1:], (1, 0), value=IGNORED) for each in examples])
        positions = torch.cat([torch.arange(len(each)) for each in examples])
        return ids, labels, torch.ones_like(ids), positions

    padding = (0, IGNORED, 0, 0)
    columns = zip(*map(row, rows), strict=True)
    return Batch(
        *(
            torch.stack([F.pad(each, (0, width - len(each)), value=value) for each in column])
            for column, value in zip(columns, padding, strict=True)
        )
    )


@pytest.mark.parametrize("of_head", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
def test_rows_of_examples_are_the_examples_alone(
    make_module, flash_attention, implementation, of_head
):
    module = make_module()
    module.model = build("llama", **LLAMA)
    module.model.config._attn_implementation = implementation
    module.logits_are_of_head = of_head and logits_are_of_head(module.model)
    examples = [torch.randint(3, VOCABULARY, (length,)) for length in (7, 5, 4, 6)]
    rows = rows_of(examples[:2], examples[2:], width=14)
    logits = module(rows)
    assert logits.shape == (2, 14, VOCABULARY)
    places = [(0, slice(0, 7)), (0, slice(7, 12)), (1, slice(0, 4)), (1, slice(4, 10))]
    nats = 0.0
    for example, place in zip(examples, places, strict=True):
        alone = module.model(input_ids=example[None]).logits[0]
        torch.testing.assert_close(logits[place], alone, rtol=1e-5, atol=1e-6)
        nats += F.cross_entropy(alone[:-1], example[1:], reduction="sum")
    found, targets = module.nats(rows)
    assert targets == 7 + 5 + 4 + 6 - 4
    torch.testing.assert_close(found, nats, rtol=1e-6, atol=0)
