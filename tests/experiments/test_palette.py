import itertools

import pytest

from rslightning.experiments.groups import Cell
from rslightning.experiments.palette import DASHES, RAMPS, cell_name, look, method_look, method_name


def lightness(color):
    """Return the lightness L* (0 to 100) of a colour, as grey print shows it (CIE 1976)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16


@pytest.mark.parametrize("method", [name for name in RAMPS if name != "full"])
def test_higher_ranks_are_brighter_in_grey_print(method):
    cells = [Cell(method, rank, 1e-3) for rank in (4, 8, 32, 128, 512, 2048)]
    shades = [lightness(look(cell, cells).color) for cell in cells]
    steps = [after - before for before, after in itertools.pairwise(shades)]
    assert min(steps) > 5
    assert shades[-1] < 86  # still seen on white


def test_rates_are_told_apart_where_there_is_one_rank():
    cells = [Cell("lora", 4, rate) for rate in (1e-4, 1e-3, 1e-2)]
    assert len({look(cell, cells).color for cell in cells}) == 3


def test_methods_differ_in_line_and_marker():
    looks = [method_look(method) for method in RAMPS if method != "full"]
    assert len({str(each.linestyle) for each in looks}) == len({e.marker for e in looks}) == 7
    assert set(DASHES) == set(RAMPS)
    assert method_look("lora/rank_corrected").fillstyle != method_look("lora").fillstyle


def test_names_say_the_rate_where_there_are_several():
    cells = [Cell("lora", 4, 1e-4), Cell("lora", 4, 1e-3), Cell("rslora", 64, 1e-3)]
    assert [cell_name(cell, cells) for cell in cells] == [
        "LoRA, r = 4, 0.0001",
        "LoRA, r = 4, 0.001",
        "rsLoRA, r = 64",
    ]
    assert method_name("lora/rank_corrected, alpha 8") == "LoRA, rank-corrected init, alpha 8"
