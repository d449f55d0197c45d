"""What `step.py` compares: the same model, adapters and batches, trained by different packages."""

import copy
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from side_by_side import finish, update_share
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rslightning import CausalLMModule, hf
from rslightning.batch import IGNORED, Batch
from rslightning.rslora import AdapterSpec, LoRALinear, scaling_factor
from rslightning.rslora.rounding import allow_merged_orders

ALPHA = 16.0
UPDATE = 0.05  # ||gamma B A|| / ||W|| of every layer at the start
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Setting(NamedTuple):
    """A Llama, and batches [rows, length]; a share of labels is masked."""

    width: int
    inner: int
    layers: int
    words: int
    rows: int
    length: int
    ranks: tuple[int, ...]
    masked: float = 0.0
    dtype: torch.dtype = torch.float32
    head: int = 64
    device: str = "cpu"
    checkpointing: bool = False
    rate: float = 1e-3


class Adapters(Mapping[str, tuple[Tensor, Tensor]]):
    """Path of each adapted module -> A [rank, in] and B [out, rank], drawn when asked for."""

    def __init__(self, base: nn.Module, rank: int, gamma: float) -> None:
        self._rank, self._gamma = rank, gamma
        self.weights = {
            path: module.weight
            for path, module in base.named_modules()
            if path.endswith(tuple(TARGETS))
        }

    def __getitem__(self, path: str) -> tuple[Tensor, Tensor]:
        weight = self.weights[path]
        out_features, in_features = weight.shape
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(path.encode()))
        draw = partial(torch.randn, generator=generator, device=weight.device)
        lora_a = draw(self._rank, in_features) * in_features**-0.5
        lora_b = draw(out_features, self._rank)
        return lora_a, lora_b * (UPDATE / update_share(weight, lora_a, lora_b, self._gamma))

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Work(NamedTuple):
    """What all contenders get.

    Attributes:
        folder: The base model's folder: its `config.json`, and room for what others write.
        base: The base model. Contenders that leave its weights as they are share them.
        adapters: What each adapted module gets.
        batches: One per step; the first step warms up.
    """

    folder: str
    setting: Setting
    rank: int
    base: Any
    adapters: Adapters
    batches: list[Batch]

    @property
    def gamma(self) -> float:
        """The scaling factor."""
        return scaling_factor(self.rank, ALPHA, "rslora")

    def autocast(self) -> AbstractContextManager[Any]:
        """Return bfloat16 autocast where the base is in bfloat16."""
        wanted = self.setting.dtype == torch.bfloat16
        return torch.autocast(
            torch.device(self.setting.device).type, torch.bfloat16, enabled=wanted
        )


class Run:
    """Loss and end of each step, and the peak of a GPU's memory in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self.losses: list[Tensor] = []
        self.ends: list[float] = []

    def step_ended(self, loss: Tensor | None = None) -> None:
        """Take the time."""
        finish()
        self.ends.append(time.perf_counter())
        if loss is not None:
            self.losses.append(loss.detach())

    @property
    def seconds(self) -> float:
        """Mean time of a step, the first one left out."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


Contender = Callable[[], Run]


def make_base(setting: Setting, folder: str) -> Any:
    """Return a Llama with random weights on its device, and write its configuration."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.words,
        hidden_size=setting.width,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.width // setting.head,
        max_position_embeddings=setting.length,
        use_cache=False,
    )
    config.save_pretrained(folder)
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(config, dtype=setting.dtype).train()


def load_base(work: Work, trained: bool = False) -> Any:
    """Return the base with the weights of all others, or with its own where they are `trained`."""
    shared = {} if trained else {id(weight): weight for weight in work.base.parameters()}
    model = copy.deepcopy(work.base, shared)
    if trained:  # others have frozen theirs
        model.requires_grad_(True)
    if work.setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def prepare(setting: Setting, folder: str, base: Any, rank: int, steps: int) -> Work:
    """Draw adapters and batches."""
    torch.manual_seed(1)
    adapters = Adapters(base, rank, scaling_factor(rank, ALPHA, "rslora"))
    return Work(folder, setting, rank, base, adapters, draw_batches(setting, steps))


def draw_batches(setting: Setting, steps: int) -> list[Batch]:
    """Return batches of random words, the same for each step, so that the losses fall."""
    shape = (setting.rows, setting.length)
    ids = torch.randint(2, setting.words, shape)
    labels = ids.clone()
    labels[:, : max(1, int(setting.masked * setting.length))] = IGNORED
    positions = torch.arange(setting.length).expand(shape)
    tensors = (ids, labels, torch.ones_like(ids), positions)
    return [Batch(*(tensor.to(setting.device) for tensor in tensors))] * steps


def rows_of(work: Work) -> list[dict[str, Tensor]]:
    """Return the rows of all batches, as the trainers of Hugging Face want them."""
    return [
        {"input_ids": ids, "labels": labels}
        for batch in work.batches
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]


def loop(
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    make_optimizer: Callable[[], torch.optim.Optimizer] | None,
) -> Run:
    """Make a step per batch."""
    run = Run()
    optimizer = make_optimizer() if make_optimizer else None
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        run.step_ended(loss)
    return run


def adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], rate, weight_decay=0.0)


def bare_loop(work: Work, model: nn.Module, loss_of: Callable[[Batch], Tensor]) -> Contender:
    return partial(
        loop, work.batches, loss_of, partial(adamw, list(model.parameters()), work.setting.rate)
    )


@torch.no_grad()
def our_module(work: Work, compiled: bool = False) -> CausalLMModule:
    """Return this package's module with the adapters."""
    module = CausalLMModule(
        work.folder,
        AdapterSpec(work.rank, ALPHA, "rslora"),
        partial(torch.optim.AdamW, lr=work.setting.rate, weight_decay=0.0),
        dtype=str(work.setting.dtype).removeprefix("torch."),
        compile=compiled,
    )
    base = patch.object(hf, "load_causal_lm", return_value=load_base(work))
    with base, patch.object(LoRALinear, "reset_adapter"):  # nothing is read, and nothing drawn
        module.configure_model()
    for path, (lora_a, lora_b) in work.adapters.items():
        layer = module.model.get_submodule(path)
        layer.lora_a.copy_(lora_a)
        layer.lora_b.copy_(lora_b)
    return module


def ours(work: Work, compiled: bool = False) -> Contender:
    module = our_module(work, compiled)
    if work.setting.dtype.itemsize == 2:
        allow_merged_orders(module.model, work.setting.dtype)  # as a fit does now and then

    def loss_of(batch: Batch) -> Tensor:
        with work.autocast():
            return module.training_step(batch, 0)

    return partial(loop, work.batches, loss_of, module.configure_optimizers)


class StepEnds(Callback):
    """Tells a run of each step's end."""

    def __init__(self) -> None:
        self.run = Run()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any
    ) -> None:
        """Take time and loss."""
        self.run.step_ended(outputs["loss"])


def ours_fit(work: Work) -> Contender:
    module, mixed = our_module(work), work.setting.dtype == torch.bfloat16

    def fit() -> Run:
        ends = StepEnds()
        trainer = Trainer(
            accelerator="gpu" if work.setting.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if mixed else "32-true",
            max_steps=len(work.batches),
            callbacks=[ends],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(work.batches, batch_size=None))
        return ends.run

    return fit


@torch.no_grad()
def peft_model(work: Work, adapters_in_float32: bool = True) -> Any:
    """Return PEFT's model with the adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=work.rank,
        lora_alpha=ALPHA,
        use_rslora=True,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    base = load_base(work)
    with torch.device(work.setting.device):  # else A would be drawn on the CPU
        model = get_peft_model(base, config, autocast_adapter_dtype=adapters_in_float32)
    for path, (lora_a, lora_b) in work.adapters.items():
        layer = model.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.copy_(lora_a)
        layer.lora_B["default"].weight.copy_(lora_b)
    return model


def hugging_face_loss(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch.input_ids, labels=batch.labels).loss
    return loss


def peft(work: Work, compiled: bool = False) -> Contender:
    model = peft_model(work)
    if compiled:
        hf.compile_decoder_layers(model.base_model.model)
    return bare_loop(work, model, partial(hugging_face_loss, model))


def peft_autocast(work: Work, compiled: bool = False) -> Contender:
    model = peft_model(work)
    if compiled:
        hf.compile_decoder_layers(model.base_model.model)

    def loss_of(batch: Batch) -> Tensor:
        with work.autocast():
            return hugging_face_loss(model, batch)

    return bare_loop(work, model, loss_of)


def peft_bfloat16(work: Work) -> Contender:
    model = peft_model(work, adapters_in_float32=False)
    return bare_loop(work, model, partial(hugging_face_loss, model))


def full(work: Work) -> Contender:
    model = load_base(work, trained=True)
    return bare_loop(work, model, partial(hugging_face_loss, model))


def frozen(work: Work) -> Contender:
    model = load_base(work).requires_grad_(False)

    def loss_of(batch: Batch) -> Tensor:
        embedded = model.get_input_embeddings()(batch.input_ids).requires_grad_()
        loss: Tensor = model(inputs_embeds=embedded, labels=batch.labels).loss
        return loss

    return partial(loop, work.batches, loss_of, None)


def trainer_options(work: Work) -> dict[str, Any]:
    """Return what the two trainers of Hugging Face are told; the rest is as it comes."""
    return {
        "output_dir": f"{work.folder}/trainer",
        "per_device_train_batch_size": work.setting.rows,
        "max_steps": len(work.batches),
        "learning_rate": work.setting.rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": work.setting.dtype == torch.bfloat16,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": work.setting.device != "cuda",
    }


def train_again(trainer: Any) -> Contender:
    """Return a run of a trainer of Hugging Face, which goes on with its model each time."""
    from transformers import PrinterCallback, TrainerCallback

    run = Run()

    class Ends(TrainerCallback):
        """Tells the run of each step's end."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """Take the time."""
            run.step_ended()

    original = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = original(*args, **kwargs)
        run.losses.append(loss.detach())
        return loss

    def train() -> Run:
        nonlocal run
        run = Run()
        trainer.train()
        return run

    trainer.training_step = training_step
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Ends())
    return train


def hugging_face_trainer(work: Work) -> Contender:
    from transformers import Trainer, TrainingArguments

    options = TrainingArguments(**trainer_options(work))
    return train_again(Trainer(peft_model(work), options, train_dataset=rows_of(work)))


def trl(work: Work) -> Contender:
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    rows = [{name: each.tolist() for name, each in row.items()} for row in rows_of(work)]
    # As it comes it checkpoints, which is asked for or not on a GPU.
    on_gpu = work.setting.device == "cuda"
    checkpointing = {"gradient_checkpointing": work.setting.checkpointing} if on_gpu else {}
    skip = {"skip_prepare_dataset": True}  # the rows are words and labels already
    options = SFTConfig(**trainer_options(work), dataset_kwargs=skip, **checkpointing)
    trainer = SFTTrainer(
        peft_model(work),
        options,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return train_again(trainer)


def litgpt(work: Work) -> Contender:
    from litgpt.lora import mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    model = litgpt_model(work)
    mark_only_lora_as_trainable(model)

    def loss_of(batch: Batch) -> Tensor:
        logits = model(batch.input_ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, batch.labels[..., 1:], ignore_index=IGNORED)

    return bare_loop(work, model, loss_of)


@torch.no_grad()
def litgpt_model(work: Work) -> Any:
    """Return LitGPT's model with the same weights and adapters."""
    from litgpt.lora import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    setting, base = work.setting, load_base(work)
    parts = ("query", "key", "value", "projection", "mlp")
    config = Config(
        block_size=setting.length,
        vocab_size=setting.words,
        padded_vocab_size=setting.words,
        n_layer=setting.layers,
        n_head=setting.width // setting.head,
        n_embd=setting.width,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=base.config.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        intermediate_size=setting.inner,
        lora_r=work.rank,
        **{f"lora_{part}": True for part in parts},
    )
    model, state = GPT(config), {}
    copy_weights_hf_llama(config, {}, state, base.state_dict())
    model.load_state_dict(state, strict=False)
    for number, block in enumerate(model.transformer.h):
        for layer, names in {
            block.attn.qkv: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            block.attn.proj: ("self_attn.o_proj",),
            block.mlp.fc_1: ("mlp.gate_proj",),
            block.mlp.fc_2: ("mlp.up_proj",),
            block.mlp.proj: ("mlp.down_proj",),
        }.items():
            pairs = [work.adapters[f"model.layers.{number}.{name}"] for name in names]
            layer.lora_A.copy_(torch.cat([lora_a for lora_a, _ in pairs]))
            layer.lora_B.copy_(torch.cat([lora_b for _, lora_b in pairs]))
            layer.scaling = work.gamma
    return model


CONTENDERS: dict[str, Callable[[Work], Contender]] = {
    "PEFT": peft,
    "ours": ours,
    "ours compiled": partial(ours, compiled=True),
    "ours fit": ours_fit,
    "PEFT compiled": partial(peft, compiled=True),
    "PEFT autocast": peft_autocast,
    "PEFT autocast compiled": partial(peft_autocast, compiled=True),
    "PEFT bfloat16": peft_bfloat16,
    "HF Trainer": hugging_face_trainer,
    "TRL": trl,
    "LitGPT": litgpt,
    "full": full,
    "frozen": frozen,
}
