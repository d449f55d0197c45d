"""Folders that DeepSpeed writes, read without it: against the living model and DeepSpeed's tool."""

import os
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from jsonargparse import Namespace
from torch import nn

from rslightning import recipe_cli
from rslightning.__main__ import main
from rslightning.checkpoint import MATRICES, load_adapter
from rslightning.deepspeed_checkpoint import is_deepspeed_folder, read_deepspeed_folder
from rslightning.errors import UserError
from rslightning.rslora import AdapterSpec, adapter_parameters, inject_adapters

cpu = pytest.importorskip("deepspeed_cpu")

NET_SPEC = AdapterSpec(rank=3, alpha=5.0, targets=["up", "down"])


class Net(nn.Module):
    """81 trained numbers in matrices of 21, 15, 15 and 30: parts of 2 or 3 processes have gaps."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict(
            {"up": nn.Linear(7, 5, bias=False), "down": nn.Linear(5, 10, bias=False)}
        )
        inject_adapters(self.model, NET_SPEC)

    def forward(self, x):
        return self.model["down"](self.model["up"](x).tanh())


class Case(NamedTuple):
    """How a folder is written."""

    stage: int
    processes: int = 2
    bf16: bool = False
    exclude_frozen: bool = True
    groups: int = 1
    optimizer: type = torch.optim.AdamW
    options: tuple = ()  # of DeepSpeed's zero_optimization
    data_types: tuple = ()


CASES = [
    Case(1),
    Case(2),
    Case(3),
    Case(1, processes=3),
    Case(2, processes=3, groups=2),
    Case(3, processes=3, groups=2),
    Case(1, bf16=True),
    Case(2, bf16=True, exclude_frozen=False, groups=2),
    Case(3, bf16=True, exclude_frozen=False),
    Case(1, bf16=True, data_types=(("grad_accum_dtype", "fp32"),)),
    Case(2, options=(("round_robin_gradients", True),)),
    Case(2, processes=3, options=(("parameter_alignment", True),)),
    Case(3, processes=3, options=(("sub_group_size", 16),)),
    Case(3, options=(("stage3_param_persistence_threshold", 0),), optimizer=torch.optim.SGD),
    Case(2, optimizer=torch.optim.SGD),
    Case(1, processes=1),
]


def write(folder, case, make, rank):
    """Train 4 steps; leave the checkpoints of steps 3 and 4 and the masters at step 4.

    `make()` returns a module with adapters, an input and what the checkpoint keeps of the module.
    """
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.init_distributed("gloo")
    module, x, client_state = make()
    for index, parameter in enumerate(adapter_parameters(module).values()):
        generator = torch.Generator().manual_seed(index)
        nn.init.normal_(parameter, std=0.1, generator=generator)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    groups = [{"params": parameters[start :: case.groups]} for start in range(case.groups)]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case.stage, **dict(case.options)},
        "bf16": {"enabled": case.bf16},
        "data_types": dict(case.data_types),
        "zero_allow_untested_optimizer": True,
    }
    optimizer = case.optimizer(groups, lr=0.01)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    for step in range(1, 5):
        engine.backward((engine(x).float() + rank + step).pow(2).mean())
        engine.step()
        if step >= 3:
            engine.save_checkpoint(
                str(folder / f"step-{step}.ckpt"),
                tag="checkpoint",
                client_state=client_state,
                exclude_frozen_parameters=case.exclude_frozen,
            )
    is_master = case.stage < 3 and not case.bf16  # then every process has the whole parameter
    masters = {
        name: (p.detach() if is_master else safe_get_full_fp32_param(p)).clone()
        for name, p in trained.items()
    }
    if rank == 0:
        torch.save(masters, folder / "masters.pt")


def make_net(bf16):
    torch.manual_seed(0)
    x = torch.randn(2, 7, dtype=torch.bfloat16 if bf16 else torch.float32)
    hparams = {"adapter": asdict(NET_SPEC), "base_model": "a-net"}
    return Net(), x, {"hyper_parameters": hparams, "transposed": [], "global_step": 4}


FOLDERS: dict[Case, Path] = {}


@pytest.fixture
def written(tmp_path_factory, run_processes):
    """Return a function that writes the folder of a case, once, and returns it."""

    def folder_of(case):
        if case not in FOLDERS:
            folder = tmp_path_factory.mktemp("deepspeed")
            codes = run_processes(
                case.processes,
                lambda rank: write(folder, case, lambda: make_net(case.bf16), rank),
            )
            assert codes == [0] * case.processes
            FOLDERS[case] = folder
        return FOLDERS[case]

    return folder_of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_masters_of_the_adapters(written, case, monkeypatch):
    folder = written(case)
    truth = torch.load(folder / "masters.pt")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not case.data_types:  # DeepSpeed's tool does not know its own bf16 optimizer
        theirs = get_fp32_state_dict_from_zero_checkpoint(
            folder / "step-4.ckpt", exclude_frozen_parameters=True
        )
        assert {name: tensor.tolist() for name, tensor in theirs.items()} == {
            name: tensor.tolist() for name, tensor in truth.items()
        }
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    content = read_deepspeed_folder(folder / "step-4.ckpt", MATRICES)
    assert content["global_step"] == 4
    assert set(content["state_dict"]) == set(truth)
    for name, master in truth.items():
        assert content["state_dict"][name].dtype == torch.float32
        assert torch.equal(content["state_dict"][name], master)
        if case.bf16:
            assert not torch.equal(master, master.bfloat16().float())  # masters, not weights


def test_only_what_is_asked_for(written):
    folder = written(Case(2)) / "step-4.ckpt"
    found = read_deepspeed_folder(folder, (".lora_b",))["state_dict"]
    assert set(found) == {"model.up.lora_b", "model.down.lora_b"}


def test_the_adapter(written):
    folder = written(Case(3))
    adapter = load_adapter(folder / "step-4.ckpt")
    truth = torch.load(folder / "masters.pt")
    assert adapter.base_model == "a-net"
    assert set(adapter.layers) == {"up", "down"}
    for path, layer in adapter.layers.items():
        assert torch.equal(layer.lora_a, truth[f"model.{path}.lora_a"])
        assert torch.equal(layer.lora_b, truth[f"model.{path}.lora_b"])
        assert layer.numbers == NET_SPEC.resolve(path)


# --- folders that are not whole -------------------------------------------------------------------


@pytest.fixture
def copied(written, tmp_path):
    """Return a function that copies the last checkpoint of a case."""

    def copy(case):
        return Path(shutil.copytree(written(case) / "step-4.ckpt", tmp_path / "x.ckpt"))

    return copy


def refused(path):
    assert is_deepspeed_folder(path)
    with pytest.raises(UserError) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PART = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
STATES = {
    1: "mp_rank_00_model_states.pt",
    2: "mp_rank_00_model_states.pt",
    3: "zero_pp_rank_0_mp_rank_00_model_states.pt",
}


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_missing_part(copied, stage, missing):
    folder = copied(Case(stage, processes=3, groups=2 if stage == 3 else 1))
    (folder / "checkpoint" / PART.format(missing)).unlink()
    assert refused(folder) == (
        f"{folder} lacks {PART.format(missing)}: it was not written or copied to the end."
    )


@pytest.mark.parametrize("missing", ["latest", "checkpoint/" + PART.format("*")])
def test_a_folder_that_was_not_finished(copied, missing):
    folder = copied(Case(2))
    for file in folder.glob(missing):
        file.unlink()
    assert refused(folder) == (
        f"{folder} was not written to the end, or not by ZeRO stage 1, 2 or 3."
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_missing_model_states(copied, stage):
    folder = copied(Case(stage))
    (folder / "checkpoint" / STATES[stage]).unlink()
    assert refused(folder) == f"{folder} has no model states: it was not written to the end."


def test_parts_of_a_run_on_more_processes(written, copied):
    folder = copied(Case(1))
    other = written(Case(1, processes=3)) / "step-4.ckpt"
    message = f"{folder} mixes files of runs on different numbers of processes."
    shutil.copy(other / "checkpoint" / PART.format(2), folder / "checkpoint")
    assert refused(folder) == message  # one part too many
    (folder / "checkpoint" / PART.format(2)).unlink()
    shutil.copy(other / "checkpoint" / PART.format(1), folder / "checkpoint")
    assert refused(folder) == message  # the right number, of which one is another run's


@pytest.mark.parametrize("case", [Case(2), Case(3), Case(2, optimizer=torch.optim.SGD)], ids=str)
def test_parts_of_two_steps(written, copied, case):
    folder = copied(case)
    older = written(case) / "step-3.ckpt"
    shutil.copy(older / "checkpoint" / PART.format(1), folder / "checkpoint")
    assert refused(folder) == (
        f"{folder} mixes files of different steps, as when overwriting was interrupted: take an "
        "older checkpoint."
    )


def without_weights(content):
    content["module"] = {}


@pytest.mark.parametrize("case", [Case(1), Case(2, bf16=True)], ids=str)
def test_a_folder_without_weights(copied, written, case):
    folder = copied(case)
    changed(folder / "checkpoint" / STATES[2], without_weights)
    truth = torch.load(written(case) / "masters.pt")
    found = read_deepspeed_folder(folder, MATRICES)["state_dict"]
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], master) for name, master in truth.items())
    name = ("bf16_" if case.bf16 else "") + PART.format(1)
    shutil.copy(written(case) / "step-3.ckpt" / "checkpoint" / name, folder / "checkpoint")
    assert refused(folder).startswith(f"{folder} mixes files of different steps, ")


@pytest.mark.parametrize("name", ["model.up.lora_b", "model.down.lora_a"])
def test_one_weight_that_is_not_its_master_s(copied, name):
    def change(content):
        content["module"] = {name: content["module"][name] + 1e-3}

    folder = copied(Case(2))
    changed(folder / "checkpoint" / STATES[2], change)
    assert refused(folder).startswith(f"{folder} mixes files of different steps, ")


def test_tensor_parallelism(copied):
    folder = copied(Case(2))
    name = "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    for rank in range(2):
        (folder / "checkpoint" / PART.format(rank)).rename(folder / "checkpoint" / name)
    assert refused(folder) == f"{folder} holds {name}: tensor parallelism cannot be read."


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", [PART.format(0), PART.format(1), STATES[2]])
def test_a_truncated_file(copied, name, share):
    folder = copied(Case(2))
    file = folder / "checkpoint" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert refused(folder) == f"{file} is damaged, incomplete or no checkpoint."


def changed(file, change):
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def test_full_fine_tuning(copied):
    folder = copied(Case(2))
    hparams = {"adapter": None, "base_model": "a-net"}
    changed(folder / "checkpoint" / STATES[2], lambda c: c.update(hyper_parameters=hparams))
    assert refused(folder) == (
        f"{folder} has no adapter: it is from full fine-tuning or another program. The merged/ "
        "folder of a full fine-tuning run is the model itself."
    )


def renamed(content):
    content["param_shapes"] = [
        {f"{name}.weight": shape for name, shape in group.items()}
        for group in content["param_shapes"]
    ]


def test_no_adapter_inside(copied):
    folder = copied(Case(3))
    changed(folder / "checkpoint" / STATES[3], renamed)
    assert refused(folder) == f"{folder} holds no adapter matrices."


@pytest.mark.parametrize("length", [-1, 1])
def test_a_part_of_another_length(copied, length):
    def change(content):
        groups = content["optimizer_state_dict"]["fp32_flat_groups"]
        groups[0] = torch.cat([groups[0], torch.ones(1)]) if length > 0 else groups[0][:length]

    folder = copied(Case(3))
    changed(folder / "checkpoint" / PART.format(1), change)
    assert refused(folder).startswith(
        f"{folder} is not laid out as checkpoints of ZeRO stages 1, 2 and 3 are: "
    )


@pytest.mark.parametrize("content", [{}, [1], {"optimizer_state_dict": {"partition_count": "x"}}])
@pytest.mark.parametrize("name", [PART.format(0), PART.format(1), STATES[2]])
def test_another_layout(copied, name, content):
    folder = copied(Case(2))
    torch.save(content, folder / "checkpoint" / name)
    assert refused(folder).startswith(
        f"{folder} is not laid out as checkpoints of ZeRO stages 1, 2 and 3 are: "
    )


class Intruder:
    """An object whose pickle makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["part", "states"])
def test_code_is_refused_and_not_run(copied, tmp_path, stage, kind):
    folder, mark = copied(Case(stage)), tmp_path / "the code ran"
    file = folder / "checkpoint" / (PART.format(1) if kind == "part" else STATES[stage])
    changed(file, lambda content: content.update(ds_config=Intruder(mark)))
    message = refused(folder)
    assert message.startswith(f"{file} cannot be opened: it holds ")
    assert message.endswith(".mkdir, which could run code.")
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # the trap works


# --- runs of the framework ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_merges_as_its_adapter(
    stage, tmp_path, run_processes, make_module, make_data, make_trainer, model_folder
):
    """The truth are the masters of the living model, saved in a file as one process writes it."""

    def fit(rank):
        warnings.simplefilter("ignore")
        from deepspeed.utils import safe_get_full_fp32_param

        strategy = cpu.CPUZeroStrategy(stage=stage)
        trainer = make_trainer(strategy=strategy, max_steps=3, devices=2)
        module = make_module()
        trainer.fit(module, make_data())
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        masters = {name: safe_get_full_fp32_param(p).clone() for name, p in trained.items()}
        if rank == 0:
            plain = {"state_dict": masters, "hyper_parameters": dict(module.hparams)}
            torch.save(plain, tmp_path / "plain.ckpt")

    assert run_processes(2, fit) == [0, 0]
    merge_both(tmp_path, model_folder)


def merge_both(folder, model_folder):
    """Merge the checkpoint of a run, that of one process, and a run folder with both kinds."""
    export = ("export", "--checkpoint", folder / "run.ckpt", "--output", folder / "whole/adapter")
    (folder / "whole/checkpoints").mkdir(parents=True)
    assert main([str(word) for word in export]) == 0
    shutil.copytree(folder / "run.ckpt", folder / "whole/checkpoints/last.ckpt")
    weights = []
    for source in ("run.ckpt", "plain.ckpt", "whole"):
        output = folder / f"merged-{source}"
        assert main(["merge", "--checkpoint", str(folder / source), "--output", str(output)]) == 0
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    assert weights[0] != (model_folder / "model.safetensors").read_bytes()


def options(checkpoint):
    model = Namespace(adapter=Namespace(rank="auto"))
    return Namespace(model=model, ckpt_path=str(checkpoint))


def test_the_rank_of_a_checkpoint(written):
    given = options(written(Case(3)) / "step-4.ckpt")
    recipe_cli.resolve_rank(given, is_run=True)
    assert given.model.adapter.rank == 3


def test_the_rank_of_a_checkpoint_that_is_none(copied, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError) as caught:
        recipe_cli.resolve_rank(options(tmp_path / "run"), is_run=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run'} is a folder, but no checkpoint of DeepSpeed or of FSDP2."
    )
    folder = copied(Case(3))
    changed(folder / "checkpoint" / STATES[3], lambda content: content.pop("hyper_parameters"))
    with pytest.raises(UserError, match=r"^rank: auto takes the rank of the checkpoint, and "):
        recipe_cli.resolve_rank(options(folder), is_run=True)
