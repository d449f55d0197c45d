"""Put examples of uneven length into blocks of one length with almost nothing left over.

Longest first, as in first-fit decreasing; but each block is finished before the next is begun,
with the one or two examples that fill its room best. First-fit alone leaves gaps where examples are
about half a block long, because it never looks for two that fit together.
"""

from collections.abc import Sequence


def pack(lengths: Sequence[int], block_length: int) -> list[list[int]]:
    """Assign every example to a block.

    Args:
        lengths: Tokens of each example, each from 1 to `block_length`.
        block_length: Tokens of a block.

    Returns:
        The examples' indices, block by block. Which example goes where is a function of the
        arguments alone.

    Raises:
        ValueError: If an example does not fit into a block.
    """
    shelf = _Shelf(lengths, block_length)
    blocks = []
    while (longest := shelf.longest(block_length)) is not None:
        block = [shelf.take(longest)]
        room = block_length - longest
        while room and (chosen := shelf.best_fill(room)):
            block += [shelf.take(length) for length in chosen]
            room -= sum(chosen)
        blocks.append(block)
    return blocks


class _Shelf:
    """The examples that are left, by length; a bit mask tells which lengths there are."""

    def __init__(self, lengths: Sequence[int], block_length: int) -> None:
        self.by_length: list[list[int]] = [[] for _ in range(block_length + 1)]
        for index in reversed(range(len(lengths))):
            if not 0 < lengths[index] <= block_length:
                raise ValueError(
                    f"example {index} has {lengths[index]} tokens; a block holds {block_length}"
                )
            self.by_length[lengths[index]].append(index)
        self.mask = sum(1 << length for length, there in enumerate(self.by_length) if there)

    def take(self, length: int) -> int:
        index = self.by_length[length].pop()
        if not self.by_length[length]:
            self.mask ^= 1 << length
        return index

    def longest(self, room: int) -> int | None:
        """Return the greatest length up to `room` that is there."""
        fitting = self.mask & ((2 << room) - 1)
        return fitting.bit_length() - 1 if fitting else None

    def best_fill(self, room: int) -> list[int]:
        """Return one or two lengths that leave the least of `room`, the longest first.

        A pair is sought for an exact fill only if no single example is one, and the first pair with
        the longest possible member is taken, so that the short ones last.
        """
        single = self.longest(room)
        if single is None or single == room:
            return [] if single is None else [single]
        best, left = [single], room - single
        first: int | None = single
        while first is not None and 2 * first >= room - left and left:
            second = self.longest(min(first, room - first))
            if second == first and len(self.by_length[first]) < 2:
                second = self.longest(first - 1)
            if second is not None and room - first - second < left:
                best, left = [first, second], room - first - second
            first = self.longest(first - 1)
        return best
