import math

import pytest
import yaml
from made_runs import STEPS, falling, make_config, make_run, write_run

from rslightning.errors import UserError
from rslightning.experiments.runs import method_order, read_run


def test_a_run_is_what_its_configuration_says(tmp_path):
    folder = write_run(tmp_path, "lora", rank=16, rate=5e-5, seed=3, held_out=1.5)
    run = read_run(folder, "cell", in_sweep=True)
    assert (run.method, run.rank, run.alpha, run.learning_rate, run.seed) == (
        "lora", 16, 16.0, 5e-5, 3,
    )  # fmt: skip
    words = "tiny on GSM8K: AdamW, 8 x 256 tokens, 24 steps"
    assert (str(run.setting), run.max_steps) == (words, STEPS)
    assert run.held_out_loss == 1.5


def test_the_final_training_loss_is_the_mean_of_the_last_ten_steps():
    losses = [9.0] * 3 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.5]
    assert make_run(losses=losses).final_training_loss == pytest.approx(5.55)


@pytest.mark.parametrize(
    ("scaling", "changes", "method"),
    [
        ("full", {}, "full"),
        ("rslora", {}, "rslora"),
        ("unit", {"init": "rank_corrected"}, "unit/rank_corrected"),
        ("lora", {"allocation": {"target_rank": 2}}, "adalora"),
        ("rslora", {"allocation": {"target_rank": 2}}, "adalora-rslora"),
    ],
)
def test_methods_have_names(scaling, changes, method):
    assert make_run(scaling, **changes).method == method


def test_a_rate_that_yaml_reads_as_text_is_a_number(tmp_path):
    folder = write_run(tmp_path)
    text = yaml.safe_dump(make_config("lora", 4, "XX", 0)).replace("XX", "5e-5")
    (folder / "config.yaml").write_text(text)
    assert isinstance(yaml.safe_load(text)["model"]["optimizer"]["init_args"]["lr"], str)
    assert read_run(folder, "cell", in_sweep=True).learning_rate == 5e-5


@pytest.mark.parametrize(
    ("state", "steps", "in_sweep", "expected"),
    [
        ("finished", 3, True, "finished"),
        ("failed", STEPS, False, "failed"),
        (None, STEPS, True, "unfinished"),
        (None, STEPS, False, "finished"),
        (None, STEPS - 1, False, "unfinished"),
    ],
)
def test_how_a_run_ended(tmp_path, state, steps, in_sweep, expected):
    losses = falling(2.0)[:steps]
    run = read_run(write_run(tmp_path, losses=losses, state=state), "cell", in_sweep)
    assert run.state == expected


@pytest.mark.parametrize(
    ("state", "message", "losses", "broke"),
    [
        ("finished", "", [4.0, 3.0], False),
        ("finished", "", [4.0, math.nan], True),
        ("failed", "The loss of step 7 is not finite.", [4.0, 3.0], True),
        ("failed", "Step 3: the loss is nan.", [4.0, 3.0], True),
        ("failed", "alpha must be positive and finite, got -1.0.", [4.0, 3.0], False),
        ("failed", "No space left on the disk.", [4.0, 3.0], False),
        ("unfinished", "", [4.0, 3.0], False),
    ],
)
def test_a_loss_that_is_not_finite_is_a_result_and_other_failures_are_not(
    state, message, losses, broke
):
    run = make_run(losses=losses, state=state, message=message)
    assert run.broke is broke
    assert run.counts is (broke or state == "finished")


@pytest.mark.parametrize("content", ["a: [", "- 1", "\xff"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.yaml(, .*,)? (is not YAML|holds no map)"):
        read_run(tmp_path, "cell", in_sweep=True)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_status_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json (is not JSON|holds no mapping)"):
        read_run(tmp_path, "cell", in_sweep=True)


def test_methods_are_in_the_order_of_the_paper():
    methods = ["full", "own", "rslora", "adalora-rslora", "adalora", "lora/gaussian", "lora"]
    assert sorted(methods, key=method_order) == [
        "lora", "lora/gaussian", "rslora", "adalora", "adalora-rslora", "full", "own",
    ]  # fmt: skip
