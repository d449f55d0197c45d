"""Read TensorBoard's event files: scalars by tag, and the settings of the run, in one pass.

A file is a sequence of records: length (8 bytes, little-endian), checksum of the length (4), an
`Event` message (length), checksum of the message (4). Checksums are not computed: in Python they
would take longer than everything else, and what a killed writer leaves is a record cut short,
which shows without them.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event

PATTERN: Final = "events.out.tfevents.*"
HEADER: Final = 12
FOOTER: Final = 4
NUMBERS: Final = frozenset((1, 2, 3, 4, 5, 6, 9, 14, 17, 19, 22, 23))
"""Values of TensorFlow's `DataType` that are numbers; 7 is text."""


class Curve(NamedTuple):
    """One scalar over the optimizer steps.

    Attributes:
        steps: Increasing, [n] int64.
        values: [n] float64; may hold NaN and infinities, as the run wrote them.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Events(NamedTuple):
    """What the event files of one run hold.

    Attributes:
        curves: Tag -> curve.
        settings: What the HParams tab shows: name -> number or text.
    """

    curves: dict[str, Curve]
    settings: dict[str, float | str | bool]


def read_events(folder: Path) -> Events:
    """Return the scalars and settings in the event files of `folder`.

    A run that was killed and went on leaves several files whose steps overlap: of each step the
    newest value counts. A file ends at its last whole record.
    """
    points: dict[str, list[tuple[int, float, float]]] = {}
    settings: dict[str, float | str | bool] = {}
    for path in sorted(folder.glob(PATTERN)):
        for event in _events(path.read_bytes()):
            _collect(event, points, settings)
    return Events({tag: _newest(points[tag]) for tag in sorted(points)}, settings)


def records(content: bytes) -> Iterator[bytes]:
    """Yield the messages of an event file up to the first one that is cut short."""
    position, end = 0, len(content)
    while position + HEADER <= end:
        (length,) = struct.unpack_from("<Q", content, position)
        start = position + HEADER
        position = start + length + FOOTER
        if position > end:
            return
        yield content[start : start + length]


def _events(content: bytes) -> Iterator[Any]:
    """Yield the events of a file; what cannot be parsed is the end of it."""
    parse = Event.FromString
    try:
        for message in records(content):
            yield parse(message)
    except DecodeError:
        return


def _collect(event: Any, points: dict[str, list[Any]], settings: dict[str, Any]) -> None:
    step, time = event.step, event.wall_time
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            points.setdefault(value.tag, []).append((step, time, value.simple_value))
        elif kind == "tensor" and value.tensor.dtype in NUMBERS:
            number = _scalar(value.tensor)
            if number is not None:
                points.setdefault(value.tag, []).append((step, time, number))
        elif value.metadata.plugin_data.plugin_name == "hparams":
            settings |= _settings(value.metadata.plugin_data.content)


def _scalar(tensor: Any) -> float | None:
    """Return the one number that a tensor holds; null if it holds several."""
    from tensorboard.util.tensor_util import make_ndarray

    array = make_ndarray(tensor)
    return float(array.reshape(())) if array.size == 1 else None


def _settings(content: bytes) -> dict[str, float | str | bool]:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData.FromString(content)
    return {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in data.session_start_info.hparams.items()
        if value.WhichOneof("kind") not in (None, "null_value")
    }


def _newest(points: list[tuple[int, float, float]]) -> Curve:
    """Return the curve of (step, time, value): one value a step, the newest."""
    steps = np.array([point[0] for point in points], dtype=np.int64)
    times = np.array([point[1] for point in points], dtype=np.float64)
    values = np.array([point[2] for point in points], dtype=np.float64)
    order = np.lexsort((np.arange(len(steps)), times, steps))
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return Curve(steps[last], values[last])
