import os

import pytest
import torch
from safetensors import safe_open

from pipeline.core.tensors import write_tensors


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_of_the_user_holds(tmp_path, umask, mode):
    path, before = tmp_path / "x.safetensors", os.umask(umask)
    try:
        write_tensors(path, {"a": torch.arange(3)}, {"format": "pt"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"} and file.get_tensor("a").tolist() == [0, 1, 2]
