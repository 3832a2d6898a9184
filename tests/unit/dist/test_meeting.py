"""Work that fails on some ranks: all learn the same of it, at once, and collectives work again afterwards."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import ConfigError, DataError
from pipeline.dist.group import Place, by_first, gather_objects, process_group
from pipeline.dist.meeting import Held, Meeting


def together(place: Place) -> list[int]:
    """A collective of all ranks."""
    total = torch.tensor([place.rank])
    dist.all_reduce(total)
    return [int(total), *gather_objects(place.rank)]


def all_well(meeting: Meeting, place: Place) -> None:
    """The next work is done, by collectives."""
    world = place.world_size
    held = meeting.hold(lambda: together(place))
    assert held.failure is None and held.value == [sum(range(world)), *range(world)]


def said(held: Held[object]) -> str:
    """Why it has failed, which every rank knows in the same words."""
    assert held.value is None and held.failure is not None
    assert len(set(gather_objects(tuple(held.failure)))) == 1
    return held.failure.text


def fails_while_others_wait(place: Place, when: int, who: int) -> list[int]:
    """Rank ``who`` fails after ``when`` collectives; the others wait in the next one."""
    for number in range(4):
        if number == when and place.rank == who:
            raise DataError("shard 7 is damaged")
        together(place)
    return together(place)


@pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.world_size(n)) for n in (2, 4)])
def test_a_rank_that_fails_leaves_no_other_one_waiting(size):
    with process_group(timeout_minutes=60) as place:
        assert place.world_size == size
        meeting = Meeting(place)
        for when in (0, 3):
            for who in (0, place.world_size - 1):
                held = meeting.hold(lambda when=when, who=who: fails_while_others_wait(place, when, who))
                assert said(held) == f"rank {who}: shard 7 is damaged" and held.failure.trace == ""
                all_well(meeting, place)


@pytest.mark.world_size(2)
def test_what_no_collective_shows_is_known_to_all():
    """A rank that has done its part fails with the other, and what was made on one rank alone is as if it were not."""
    with process_group(timeout_minutes=60) as place:
        meeting = Meeting(place)

        def one() -> str:
            if place.rank == 1:
                raise ZeroDivisionError("by zero")
            return "done"

        held = meeting.hold(one)
        assert said(held) == "rank 1: ZeroDivisionError: by zero" and 'raise ZeroDivisionError("by zero")' in held.failure.trace
        all_well(meeting, place)

        def alike() -> None:
            raise ConfigError("no such encoder")

        assert said(meeting.hold(alike)) == "no such encoder"
        assert said(meeting.hold(lambda: by_first(alike))) == "no such encoder"
        all_well(meeting, place)


def test_a_rank_alone(lone_group):
    place = Place(0, 1, 0, torch.device("cpu"), timedelta(minutes=1))
    meeting = Meeting(place)
    assert meeting.hold(lambda: 3) == (3, None)

    def wrong() -> None:
        raise DataError("no")

    assert said(meeting.hold(wrong)) == "no"
    assert meeting.hold(lambda: 4).value == 4
    with pytest.raises(KeyboardInterrupt):
        meeting.hold(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
