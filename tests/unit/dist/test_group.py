"""What the ranks agree on before they train."""

from __future__ import annotations

import pytest

from pipeline.core.errors import DataError


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
