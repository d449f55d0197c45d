import pytest
import yaml

from rslightning.run_config import (
    describe_changes,
    differences,
    first_difference,
    newest_config,
    next_config,
)

COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 8}}
ROWS = (
    "the pass goes on after as many batches as were read, which are others now: some rows come "
    "again, or are left out."
)


def config(**changes):
    """Return a configuration; names of changes have two underscores for a dot."""
    content = {
        "seed_everything": 0,
        "model": {
            "base_model": "/here/base",
            "adapter": {"rank": 3, "dropout": 0.0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
            "lr_scheduler": None,
        },
        "data": {"class_path": "x.Rows", "init_args": {"path": "a", "batch_size": 2}},
        "throughput": {"every_n_steps": 10},
        "trainer": {"max_steps": 4, "devices": "auto", "logger": {"init_args": {"version": 0}}},
        "ckpt_path": None,
        "auto_resume": False,
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = content
        for key in path:
            place = place[key]
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed_everything": 3}, "seed_everything is 3, and was 0"),
        ({"model__adapter__dropout": 0.1}, "model.adapter.dropout is 0.1, and was 0.0"),
        ({"trainer__max_steps": 9}, "trainer.max_steps is 9, and was 4"),
        (
            {"model__lr_scheduler": COSINE},
            f"model.lr_scheduler is {COSINE['class_path']}, and was null",
        ),
        (
            {"model__optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}},
            "model.optimizer is torch.optim.SGD, and was torch.optim.AdamW",
        ),
        ({"throughput": None}, 'throughput is null, and was {"every_n_steps": 10}'),
        (
            {"seed_everything": 3, "throughput__every_n_steps": 5},
            "seed_everything is 3, and was 0; throughput.every_n_steps is 5, and was 10",
        ),
    ],
)
def test_what_differs_is_told_by_its_key(changes, said):
    assert describe_changes(config(), config(**changes)) == (
        f"going on with another configuration than before: {said}."
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ckpt_path": "x", "auto_resume": True, "trainer__logger": False},
        {"model__base_model": "/there/base"},
        {"model__optimizer__init_args": {"lr": 0.5}},  # told by `keep_changes`
        {"newer": 1},
    ],
)
def test_what_is_not_told(changes):
    assert describe_changes(config(), config(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__init_args__batch_size": 4}, "data.batch_size is 4, and was 2"),
        ({"data__init_args__path": "b"}, "data.path is b, and was a"),
        ({"data": {"class_path": "x.Other"}}, "data is x.Other, and was x.Rows"),
        ({"trainer__devices": 2}, "trainer.devices is 2, and was auto"),
    ],
)
def test_other_batches_of_a_pass_are_told(changes, said):
    assert describe_changes(config(), config(**changes)) == (
        f"going on with another configuration than before: {said}.\n{ROWS}"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__logger__init_args__version": "version_0"},  # as a run saves that goes on
        {"trainer__logger": False},
        {"ckpt_path": "x", "auto_resume": True, "trainer__devices": 2},
        {"model__adapter__rank": "auto"},
    ],
)
def test_what_does_not_make_another_run(changes):
    assert first_difference(config(), config(**changes)) is None


def test_what_is_there_now_and_was_not_is_a_difference():
    now = config(model__lr_scheduler=COSINE)
    assert list(differences(config(), now)) == [("model.lr_scheduler", None, COSINE)]
    assert first_difference(config(), now) == f"model.lr_scheduler None, not {COSINE}"


def test_each_configuration_of_a_run_has_its_file(tmp_path):
    assert newest_config(tmp_path) is None
    names = []
    for number in range(12):
        path = next_config(tmp_path)
        path.write_text(yaml.safe_dump({"number": number}))
        names.append(path.name)
        assert newest_config(tmp_path) == {"number": number}
    assert names[:2] + names[-1:] == [
        "config.yaml",
        "config.resume-1.yaml",
        "config.resume-11.yaml",
    ]
    path.write_text("a: [")
    assert newest_config(tmp_path) is None
