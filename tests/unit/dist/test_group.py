"""What the ranks agree on before they train."""

from __future__ import annotations

import os

import pytest

from pipeline.core.errors import DataError
from pipeline.dist.group import process_group


def test_a_lone_rank_leaves_the_environment_as_it_was(monkeypatch):
    """What stays behind would be taken for a launcher's: by a second group, and by whatever is started from here."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    before = dict(os.environ)
    for _ in range(2):
        with pytest.raises(DataError), process_group(1) as place:
            assert (place.rank, place.world_size, os.environ["RANK"], os.environ["MASTER_PORT"]) == (0, 1, "0", "0")
            raise DataError("no shards")
        assert dict(os.environ) == before


@pytest.mark.world_size(2)
def test_what_no_rank_can_do_is_said_once():
    import torch.distributed as dist

    from pipeline.dist.group import by_all

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def look(broken: tuple[int, ...]) -> int:
        if rank in broken:
            raise DataError("no manifest at x")
        return rank

    assert by_all(lambda: look(())) == rank
    for broken, said in (((0, 1), "no manifest at x"), ((1,), "rank 1: no manifest at x")):
        with pytest.raises(DataError) as caught:
            by_all(lambda broken=broken: look(broken))
        assert str(caught.value) == said and caught.value.everywhere, "rank 0 prints it, whoever had it"
    dist.destroy_process_group()


@pytest.mark.world_size(2)
def test_long_work_of_the_first_rank_keeps_no_other_in_one_collective(tmp_path):
    """The work ends only after the other rank has come out of several of them."""
    import torch.distributed as dist

    from pipeline.dist import group

    dist.init_process_group("gloo")
    heard, plain = 0, group.from_first

    def counted(value):
        nonlocal heard
        heard += 1
        if heard == 3 and dist.get_rank() == 1:
            (tmp_path / "heard").touch()
        return plain(value)

    def work() -> str:
        while not (tmp_path / "heard").exists():
            pass
        return "done"

    group.from_first, group._WORD_SECONDS = counted, 0.01
    assert group.by_first_in_time(work) == "done"

    def fail() -> str:
        raise DataError("no images")

    with pytest.raises(DataError, match="no images"):
        group.by_first_in_time(fail)
    dist.destroy_process_group()
