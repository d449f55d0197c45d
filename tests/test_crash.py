"""Whenever a process dies, or its machine, what it was writing is whole, or as it was before."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from crash_points import can_watch, crash_points
from safetensors.torch import load_file

from rslightning.callbacks import TrainableCheckpoint
from rslightning.checkpoint import load_adapter
from rslightning.checkpoint_folder import CHECKPOINTS, STEP_NAME
from rslightning.data.cache import cached_folder
from rslightning.errors import UserError
from rslightning.manifest import find_damage
from rslightning.model_folder import ModelFolder
from rslightning.resume import resolve_checkpoint
from rslightning.rslora import AdapterSpec, write_adapter
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.merge_folder import merge_folder
from rslightning.rslora.spec import ResolvedAdapter
from rslightning.storage import new_folder, write_text

pytestmark = [
    pytest.mark.skipif(not can_watch(), reason="processes may not be watched here (ptrace)"),
    pytest.mark.slow,
]


@pytest.fixture
def count(capsys):
    """Return a function that prints how many points were tried and passed."""

    def say(what: str, points: list) -> None:
        torn = sum(point.torn for point in points)
        with capsys.disabled():
            print(f"\n{what}: {len(points)} points tried and passed, {torn} of them torn")

    return say


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def left_aside(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


# --- checkpoints ----------------------------------------------------------------------------------

STEPS = 5


@pytest.fixture
def fit(tmp_path, make_trainer, make_module, make_data):
    """Return a function that fits with a checkpoint at each second step, into `run/`."""
    module_options = {"adapter": AdapterSpec(rank=3, alpha=5.0, dropout=0.1)}
    data = make_data()
    data.setup("fit")

    def run(callback, ckpt_path=None):
        torch.manual_seed(7)
        module = make_module(**module_options)
        options = {"max_steps": STEPS, "limit_val_batches": 0, "enable_checkpointing": True}
        folder = {"default_root_dir": tmp_path / "run"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            trainer = make_trainer(callbacks=[callback], **options, **folder)
            trainer.fit(module, make_data(), ckpt_path=ckpt_path)
        return module.trainable_state()

    return run


def newest_saved(events) -> int:
    """Return the step of the last checkpoint that got its name."""
    names = [Path(event.path).name for event in events if event.call.startswith("rename")]
    steps = [int(match[1]) for match in map(STEP_NAME.fullmatch, names) if match]
    return max(steps, default=0)


def test_a_checkpoint_at_every_point(tmp_path, fit, count):
    folder = tmp_path / "run"
    whole = fit(TrainableCheckpoint(2))
    points = []
    begin = partial(clear, folder)
    events = []
    for point in crash_points(lambda: fit(TrainableCheckpoint(2)), folder, begin):
        events = [*events[: point.number], point.event]
        try:
            path = resolve_checkpoint(str(folder), {}).path
        except UserError:  # there is none yet
            path = None
        step = 0 if path is None else torch.load(path, weights_only=True)["global_step"]
        assert step == newest_saved(events[: point.number]), point
        resumed = fit(TrainableCheckpoint(2), path)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items()), point
        assert left_aside(folder) == [], point
        assert (folder / CHECKPOINTS / "last.ckpt").readlink().name == f"step-{STEPS}.ckpt"
        assert len(list((folder / CHECKPOINTS).iterdir())) == 3, point
        points.append(point)
    assert len(points) > 30
    count("checkpoint", points)


class NaiveCheckpoint(TrainableCheckpoint.__mro__[1]):
    """Writes into the file that it replaces, as programs do that give no thought to it."""

    def on_train_batch_end(self, trainer, *arguments):
        path = Path(trainer.default_root_dir) / CHECKPOINTS / "last.ckpt"
        path.parent.mkdir(exist_ok=True, parents=True)
        content = trainer._checkpoint_connector.dump_checkpoint(False)
        torch.save(content, path)


def test_a_naive_checkpoint_is_found_out(tmp_path, fit):
    folder = tmp_path / "run"
    lost = 0
    for _ in crash_points(lambda: fit(NaiveCheckpoint()), folder, partial(clear, folder)):
        path = folder / CHECKPOINTS / "last.ckpt"
        if path.exists():
            try:
                resolve_checkpoint(str(path), {})
            except UserError:
                lost += 1
    assert lost >= STEPS


# --- folders --------------------------------------------------------------------------------------


def random_adapter(seed: int, shapes: dict[str, tuple[int, int]], rank: int = 3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    numbers = ResolvedAdapter(rank, 5.0, "rslora")
    layers = {
        path: LayerAdapter(
            torch.randn(rank, n, generator=generator),
            torch.randn(m, rank, generator=generator),
            numbers,
        )
        for path, (m, n) in shapes.items()
    }
    return Adapter(layers, "base")


def same_adapters(one: Adapter, other: Adapter) -> bool:
    return all(
        torch.equal(one.layers[path].lora_a, layer.lora_a)
        and torch.equal(one.layers[path].lora_b, layer.lora_b)
        for path, layer in other.layers.items()
    )


@pytest.mark.parametrize("replaces", [False, True])
def test_an_adapter_folder_at_every_point(tmp_path, count, replaces):
    target = tmp_path / "run" / "adapter"
    shapes = {"model.a": (7, 5), "model.b": (5, 11)}
    before, after = random_adapter(1, shapes), random_adapter(2, shapes)

    def begin():
        clear(target.parent)
        if replaces:
            write_adapter(before, target)

    def act():
        write_adapter(after, target, replace=True)

    points = []
    for point in crash_points(act, target.parent, begin):
        if target.exists():
            found = load_adapter(target)
            assert same_adapters(found, after) or (replaces and same_adapters(found, before))
        else:
            assert not replaces, point
        act()
        assert same_adapters(load_adapter(target), after)
        assert left_aside(target.parent) == []
        points.append(point)
    count(f"adapter folder{' that replaces one' if replaces else ''}", points)


def test_a_merged_folder_at_every_point(tmp_path, model_folder, count):
    base, target = ModelFolder(model_folder), tmp_path / "run" / "merged"
    shapes = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in load_file(model_folder / "model.safetensors").items()
        if name.endswith("q_proj.weight")
    }

    def merge(seed):
        with new_folder(target, replace=True) as aside:
            merge_folder(base, random_adapter(seed, shapes), aside).write(aside)

    def weights():
        return load_file(target / "model.safetensors")

    clear(target.parent)
    expected = []
    for seed in (1, 2):
        merge(seed)
        expected.append(weights())

    def begin():
        clear(target.parent)
        merge(1)

    points = []
    for point in crash_points(partial(merge, 2), target.parent, begin):
        ModelFolder(target).check_weights()
        assert find_damage(target) is None, point
        found = weights()
        same = [all(torch.equal(found[n], each[n]) for n in each) for each in expected]
        assert sum(same) == 1, point
        report = json.loads((target / "merge_report.json").read_text())
        assert report["layers"].keys() == set(shapes)
        merge(2)
        assert left_aside(target.parent) == []
        points.append(point)
    count("merged folder that replaces one", points)


def test_a_cache_at_every_point(tmp_path, monkeypatch, make_data, count):
    root = tmp_path / "cache"
    monkeypatch.setenv("RSLIGHTNING_CACHE", str(root))

    def build():
        data = make_data(packing=True)
        data.setup("fit")
        return [[column.tolist() for column in block] for block in data.train]

    whole = build()
    points = []
    for point in crash_points(build, root, partial(clear, root)):
        for folder in [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]:
            assert find_damage(folder) is None, point
        assert build() == whole
        assert left_aside(root) == []
        points.append(point)
    count("cache", points)


def test_a_damaged_cache_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("RSLIGHTNING_CACHE", str(tmp_path))

    def build(folder):
        np.save(folder / "numbers.npy", np.arange(10))

    folder = cached_folder("key", build)
    (folder / "numbers.npy").write_bytes(b"short")
    assert np.load(cached_folder("key", build) / "numbers.npy").tolist() == list(range(10))


def test_a_small_file_at_every_point(tmp_path, count):
    path = tmp_path / "run" / "config.yaml"

    def begin():
        clear(path.parent)
        path.write_text("old")

    points = []
    for point in crash_points(partial(write_text, path, "new"), path.parent, begin):
        assert path.read_text() in ("old", "new")
        write_text(path, "new")
        assert [each.name for each in path.parent.iterdir()] == ["config.yaml"]
        points.append(point)
    count("small file", points)
