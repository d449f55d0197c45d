"""Sharded folders, read by one process: compared with the living model that wrote them."""

import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rslightning.checkpoint import MATRICES, load_adapter
from rslightning.distributed_checkpoint import is_distributed_folder, read_distributed_folder
from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora.merge_folder import merge_folder

FOLDERS: dict[int, Path] = {}


def shard(module):
    """Share out a model that every process has built."""
    if module.device_mesh is None or isinstance(next(module.model.parameters()), DTensor):
        return
    mesh = module.device_mesh["data_parallel"]
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module.model, mesh=mesh)


def write(folder, processes, rank, module, data, make_trainer):
    """Train 3 steps; leave the checkpoint and the whole matrices that are the truth."""
    warnings.simplefilter("ignore")
    strategy = ModelParallelStrategy(processes, 1, save_distributed_checkpoint=True)
    trainer = make_trainer(strategy=strategy, max_steps=3, devices=processes)
    module.configure_model()
    module.configure_model = lambda: shard(module)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "run.ckpt")
    truth = {name: tensor.full_tensor() for name, tensor in module.trainable_state().items()}
    if rank == 0:
        plain = {"state_dict": truth, "hyper_parameters": dict(module.hparams)}
        torch.save(plain, folder / "plain.ckpt")


@pytest.fixture
def written(tmp_path_factory, run_processes, make_module, make_data, make_trainer):
    """Return a function that gives the folder of a run on some processes; it is written once."""

    def folder_of(processes):
        if processes not in FOLDERS:
            folder = tmp_path_factory.mktemp("sharded")
            codes = run_processes(
                processes,
                lambda rank: write(
                    folder, processes, rank, make_module(), make_data(), make_trainer
                ),
            )
            assert codes == [0] * processes
            FOLDERS[processes] = folder
        return FOLDERS[processes]

    return folder_of


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_matrices_of_a_run(written, processes):
    """Of rank 3 on 2 processes, one has 2 rows of A; on 4, one has none."""
    folder = written(processes)
    truth = torch.load(folder / "plain.ckpt")["state_dict"]
    content = read_distributed_folder(folder / "run.ckpt", MATRICES)
    assert content["global_step"] == 3
    assert set(content["state_dict"]) == set(truth)
    assert len(truth) == 28
    for name, tensor in truth.items():
        assert content["state_dict"][name].dtype == torch.float32
        assert torch.equal(content["state_dict"][name], tensor)


def test_a_run_merges_as_its_adapter(written, model_folder, tmp_path):
    weights = {}
    for name in ("run", "plain"):
        adapter = load_adapter(written(3) / f"{name}.ckpt")
        (tmp_path / name).mkdir()
        assert len(merge_folder(ModelFolder(model_folder), adapter, tmp_path / name).layers) == 14
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["run"] == weights["plain"]
    assert weights["run"] != (model_folder / "model.safetensors").read_bytes()


def test_pieces_in_two_dimensions_of_another_dtype(tmp_path, run_processes):
    """Written by torch's own interface; a tensor that is not of the state dict is no matrix."""
    whole = {name: torch.randn(5, 7).bfloat16() for name in ("x.lora_a", "x.lora_b", "x.bias")}

    def save(rank):
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2))
        placements = [torch.distributed.tensor.Shard(1), torch.distributed.tensor.Shard(0)]
        state = {
            name: torch.distributed.tensor.distribute_tensor(tensor, mesh, placements)
            for name, tensor in whole.items()
        }
        everything = {"state_dict": state, "optimizer_0": {"x.lora_a": torch.ones(2)}}
        dcp.save(everything, checkpoint_id=tmp_path / "x.ckpt")

    assert run_processes(4, save) == [0] * 4
    torch.save({"epoch": 2}, tmp_path / "x.ckpt/meta.pt")
    content = read_distributed_folder(tmp_path / "x.ckpt", MATRICES)
    assert content["epoch"] == 2
    assert set(content["state_dict"]) == {"x.lora_a", "x.lora_b"}
    for name, tensor in content["state_dict"].items():
        assert torch.equal(tensor, whole[name].float())


# --- folders that are not whole -------------------------------------------------------------------


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written(2) / "run.ckpt", tmp_path / "x.ckpt"))


def refused(path):
    assert is_distributed_folder(path)
    with pytest.raises(UserError) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_a_missing_part(copied, name):
    (copied / name).unlink()
    assert refused(copied) == f"{copied} lacks {name}: it was not written or copied to the end."


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_folder_that_was_not_finished(copied, name):
    (copied / name).unlink()
    assert refused(copied) == f"{copied} lacks {name}: it was not written to the end."


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])  # the optimizer's state fills the rest
def test_a_truncated_part(copied, share):
    file = copied / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert refused(copied) == f"{file} is damaged, incomplete or no checkpoint."


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_metadata(copied, share):
    file = copied / ".metadata"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert refused(copied).startswith(f"{file} cannot be opened: ")


def changed_meta(folder, change):
    content = torch.load(folder / "meta.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "meta.pt")


def test_full_fine_tuning(copied):
    changed_meta(copied, lambda content: content["hyper_parameters"].update(adapter=None))
    assert refused(copied) == (
        f"{copied} has no adapter: it is from full fine-tuning or another program. The merged/ "
        "folder of a full fine-tuning run is the model itself."
    )


def test_parameters_of_another_run(copied):
    changed_meta(copied, lambda content: content["hyper_parameters"]["adapter"].update(rank=4))
    assert "which are not of the rank 4 in its hyperparameters" in refused(copied)


def changed_metadata(folder, change):
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def forget_a_piece(metadata):
    del metadata.state_dict_metadata[NAME].chunks[-1]


def forget_a_place(metadata):
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != NAME}


def forget_all(metadata):
    metadata.state_dict_metadata = {}


def exchange_places(metadata):
    """Let the pieces of one matrix be of another's shape."""
    places = metadata.storage_data
    ours = [index for index in places if index.fqn == NAME]
    other = next(index for index in places if index.fqn == NAME.replace("lora_b", "lora_a"))
    places[ours[0]] = places[other]


NAME = "state_dict.model.model.layers.1.mlp.up_proj.lora_b"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (forget_a_piece, "ValueError('the pieces hold 60 of 120 numbers of a tensor')"),
        (forget_a_place, "KeyError("),
        (exchange_places, "ValueError('a piece has the shape "),
    ],
)
def test_metadata_that_do_not_fit(copied, change, reason):
    changed_metadata(copied, change)
    assert refused(copied).startswith(
        f"{copied} is not laid out as checkpoints of torch.distributed are: {reason}"
    )


def test_no_adapter_inside(copied):
    changed_metadata(copied, forget_all)
    assert refused(copied) == f"{copied} holds no adapter matrices."


def test_no_file_outside_of_the_folder_is_read(copied):
    """A name with a path in it is taken for a file of the folder."""
    (copied / "__1_0.distcp").rename(copied.parent / "outside.distcp")

    def change(metadata):
        for place in metadata.storage_data.values():
            if place.relative_path == "__1_0.distcp":
                place.relative_path = "../outside.distcp"

    changed_metadata(copied, change)
    assert refused(copied) == (
        f"{copied} lacks outside.distcp: it was not written or copied to the end."
    )


# --- code in the files ----------------------------------------------------------------------------


class Intruder:
    """An object whose pickle makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def is_refused_and_not_run(folder, file, mark):
    message = refused(folder)
    assert message.startswith(f"{file} cannot be opened: it holds ")
    assert message.endswith(".mkdir, which could run code.")
    assert not mark.exists()


def test_code_in_the_metadata(copied, tmp_path):
    mark, file = tmp_path / "the code ran", copied / ".metadata"
    changed_metadata(copied, lambda metadata: setattr(metadata, "version", Intruder(mark)))
    is_refused_and_not_run(copied, file, mark)
    with file.open("rb") as stream:
        pickle.load(stream)
    assert mark.exists()  # the trap works


def test_code_in_what_is_no_tensor(copied, tmp_path):
    mark, file = tmp_path / "the code ran", copied / "meta.pt"
    changed_meta(copied, lambda content: content.update(epoch=Intruder(mark)))
    is_refused_and_not_run(copied, file, mark)
    torch.load(file, weights_only=False)
    assert mark.exists()


def test_code_in_a_piece(copied, tmp_path):
    mark, file = tmp_path / "the code ran", copied / "evil.distcp"
    torch.save(Intruder(mark), file)

    def change(metadata):
        place = next(p for i, p in metadata.storage_data.items() if i.fqn == NAME)
        place.relative_path, place.offset, place.length = file.name, 0, file.stat().st_size

    changed_metadata(copied, change)
    is_refused_and_not_run(copied, file, mark)
    torch.load(file, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("name", ["load", "hub.load", "Size.__init__"])
def test_functions_of_torch_in_the_metadata(copied, name):
    """What is not a class of the metadata is refused, or a thing without effect takes its place."""
    function = f"ctorch\n{name}\n".encode()
    (copied / ".metadata").write_bytes(b"\x80\x04" + function + b"(Vno such file\ntR.")
    assert "no such file" not in refused(copied)


def test_what_is_no_tensor_where_one_should_be(copied):
    torch.save([1, 2], copied / "list.distcp")

    def change(metadata):
        place = next(p for i, p in metadata.storage_data.items() if i.fqn == NAME)
        place.relative_path, place.offset, place.length = "list.distcp", 0, 10**6

    changed_metadata(copied, change)
    assert refused(copied).endswith("TypeError('list.distcp holds list where a tensor should be').")
