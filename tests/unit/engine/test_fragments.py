"""Parts of tensors: over all ranks every element once, and read back whatever the cut."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.fragments import Fragment, share, whole
from pipeline.engine.pieces import fill
from pipeline.engine.saving import write_fragments


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_hold_every_element_once(size, world):
    tensor = torch.arange(size)
    parts = [p for rank in range(world) if (p := share(whole("a", tensor), rank, world)) is not None]
    assert torch.cat([p.data for p in parts]).equal(tensor)
    assert [p.start for p in parts] == [int(p.data[0]) for p in parts]
    assert max(p.data.numel() for p in parts) - min(p.data.numel() for p in parts) <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_what_was_cut_one_way_is_read_another_way(tmp_path_factory, size, written, read):
    folder = tmp_path_factory.mktemp("parts")
    tensor = torch.randn(size)
    files = []
    for rank in range(written):
        part = share(whole("model/a", tensor), rank, written)
        files.append(folder / f"{rank}.safetensors")
        write_fragments(files[-1], [] if part is None else [part])
    found = torch.full((size,), torch.nan)
    for rank in range(read):
        part = share(whole("model/a", found), rank, read)
        if part is not None:
            fill([Fragment(*part)], files)
    assert found.equal(tensor)
