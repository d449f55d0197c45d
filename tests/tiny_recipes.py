"""Tiny stand-ins for the models and data that recipes name."""

import json

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from rslightning.recipes import find_config, packaged_names

SWEEPS = [name for name in packaged_names() if name.startswith("recipes/paper/")]
RECIPES = [name for name in packaged_names() if name.startswith("recipes/") and name not in SWEEPS]

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
OTHERS = {  # the architectures of bases that are no Llamas
    "EleutherAI/gpt-j-6b": lambda **kind: GPTJConfig(
        n_embd=24, n_layer=2, n_head=4, n_inner=40, rotary_dim=4, **kind
    ),
    "Qwen/Qwen3-4B-Base": lambda **kind: Qwen3Config(**SIZES, tie_word_embeddings=True, **kind),
    "mistralai/Mistral-7B-Instruct-v0.3": lambda **kind: MistralConfig(**SIZES, **kind),
}
TURN_BY_TURN = (  # as Mistral's: users and assistants in turn, nobody else
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turn') }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}"
    "{% endfor %}"
)


def read(recipe) -> dict:
    return yaml.safe_load(find_config(recipe).read_text())


def stand_ins(root, model_folder, orca_folder, gsm8k_folder):
    """Write models and data into `root`; return recipe -> options that put them in its place."""
    models = save_models(root, model_folder)
    text = root / "lines.txt"
    text.write_text("A line of text.\n" * 40)
    chat = root / "dialogues.jsonl"
    chat.write_text("".join(json.dumps(dialogue(index)) + "\n" for index in range(40)))
    data = {"OpenOrca": orca_folder, "GSM8K": gsm8k_folder, "PlainText": text, "Chat": chat}

    def options(recipe):
        content = read(recipe)
        path = data[content["data"]["class_path"].rpartition(".")[2]]
        return [
            f"--model.base_model={models.get(content['model']['base_model'], model_folder)}",
            "--model.pretrained=true",
            "--model.compile=false",  # takes longer than tiny models train
            f"--data.path={path}",
            "--data.max_length=128",
            "--data.held_out_examples=5",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]

    return options


def save_models(root, model_folder):
    """Return base -> tiny random model of its architecture, the tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TURN_BY_TURN
    kind = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        base: save_tiny(make(**kind), tokenizer, root / base.replace("/", "_"))
        for base, make in OTHERS.items()
    }


def save_tiny(config: PreTrainedConfig, tokenizer, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def dialogue(index: int) -> dict:
    turns = [("user", f"Is {index} even?"), ("assistant", "Yes." if index % 2 == 0 else "No.")]
    turns += [("user", "Sure?"), ("assistant", f"{index} it is.")] * (index % 3)
    if index % 5 == 4:
        turns.insert(0, ("system", "Be brief."))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}
