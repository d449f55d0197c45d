import itertools
import random

import numpy as np
import torch

from rslightning.random_streams import begin_stream


def drawn():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_the_same_place_draws_the_same():
    begin_stream(1, 2, 3, 4)
    first = drawn()
    drawn()
    begin_stream(1, 2, 3, 4)
    assert drawn() == first


def test_no_two_places_draw_the_same():
    streams = []
    for place in itertools.product((0, 1), repeat=4):
        begin_stream(*place)
        streams.append(drawn())
    for kind in range(3):
        assert len({tuple(stream[kind]) for stream in streams}) == 16


def test_any_seed_of_torch_will_do():
    first = set()
    for seed in (0, torch.default_generator.seed(), 2**63, 2**64 - 1):
        begin_stream(seed, 10**9, 0, 4095)
        first.add(torch.rand(()).item())
    assert len(first) == 4
