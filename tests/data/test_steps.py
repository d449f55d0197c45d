from types import SimpleNamespace

import pytest
import torch

from rslightning.data.steps import OptimizerSteps


def steps(micro_batches=1, processes=1, batches=float("inf")):
    return OptimizerSteps(
        SimpleNamespace(
            accumulate_grad_batches=micro_batches,
            world_size=processes,
            global_rank=processes - 1,
            num_training_batches=batches,
        )
    )


@pytest.mark.parametrize(
    ("micro_batches", "batches", "expected"),
    [(1, 5, [1] * 5), (2, 5, [2, 2, 1]), (3, 3, [3]), (4, 3, [3]), (2, float("inf"), [2] * 9)],
)
def test_windows_cover_the_batches_of_a_pass(micro_batches, batches, expected):
    plan, first, found = steps(micro_batches, batches=batches), 0, []
    for _ in expected:
        found.append(plan.window(first))
        first += found[-1]
    assert found == expected


def test_shared_targets_make_the_mean_over_the_step():
    # Lightning divides the loss of each micro-batch by 3, on each of 2 processes.
    counts, nats = [7, 2, 9, 4, 1], [3.0, 5.0, 2.0, 8.0, 1.0]
    shares = steps(3, 2, batches=5).share_targets(counts)
    for step in (slice(0, 3), slice(3, 5)):
        pairs = zip(nats[step], shares[step], strict=True)
        loss = sum(value / share / 3 / 2 for value, share in pairs)
        assert loss == pytest.approx(sum(nats[step]) / sum(counts[step]))


def test_a_step_without_targets_divides_by_one():
    assert steps().share_targets([0, 3]) == [1, 3]


def test_without_a_trainer_a_batch_is_a_step():
    alone = OptimizerSteps(None)
    assert (alone.rank, alone.processes, alone.shares, alone.window(7)) == (0, 1, 1, 1)
    assert alone.share_targets([4, 2]) == [4, 2]
    assert alone.gather(torch.tensor([1, 2])).tolist() == [[1, 2]]


def test_processes_are_known(run_processes, tmp_path):
    def rank(number):
        torch.distributed.init_process_group("gloo")
        plan = steps(processes=2)
        plan.trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
        table = plan.gather(torch.tensor([number, 10 * number]))
        (tmp_path / str(number)).write_text(str(table.tolist()))

    assert run_processes(2, rank) == [0, 0]
    assert {(tmp_path / str(number)).read_text() for number in range(2)} == {"[[0, 0], [1, 10]]"}
