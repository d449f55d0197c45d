"""A fit of ours and a bare PEFT loop: same model, rows, order and initialization, same result."""

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rslightning import CausalLMModule
from rslightning.data import GSM8K
from rslightning.losses import token_nats
from rslightning.rslora import AdapterSpec, adapter_state_dict

RANK, ALPHA, RATE, STEPS = 32, 16.0, 5e-4, 30
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gsm8k_data(folder, tokenizer) -> GSM8K:
    data = GSM8K(
        str(folder),
        str(tokenizer),
        max_length=256,
        batch_size=8,
        packing=False,
        num_examples=8 * STEPS,
        held_out_examples=64,
        train_on_prompt=True,
    )
    data.setup("fit")
    return data


@torch.no_grad()
def held_out_loss(logits_of, data) -> float:
    nats = targets = 0.0
    for batch in data.val_dataloader():
        batch_nats, batch_targets = token_nats(logits_of(batch), batch.labels)
        nats, targets = nats + float(batch_nats), targets + int(batch_targets)
    return nats / targets


def ours(folder, data) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = CausalLMModule(
        str(folder),
        AdapterSpec(RANK, ALPHA, "rslora"),
        lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0),
        dtype="float32",
    )
    module.configure_model()
    start = {name: tensor.clone() for name, tensor in adapter_state_dict(module.model).items()}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return held_out_loss(module.eval(), data), start


def bare_peft_loop(folder, data, start) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=TARGETS)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                parameter.copy_(start[f"{path}.lora_a"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    for batch in data.train_dataloader():
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def logits_of(batch):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    return held_out_loss(logits_of, data)


@pytest.mark.slow
def test_a_fit_equals_a_bare_peft_loop(babyllama361, gsm8k):
    data = gsm8k_data(gsm8k, babyllama361)
    assert len(data.train_dataloader()) == STEPS
    our_loss, start = ours(babyllama361, data)
    peft_loss = bare_peft_loop(babyllama361, data, start)
    print(f"held-out loss after {STEPS} steps: ours {our_loss:.4f}, PEFT {peft_loss:.4f}")
    assert our_loss == pytest.approx(peft_loss, abs=0.02)
    assert our_loss < 2.0
