"""Data sets of torchvision that cannot be opened, or whose samples cannot all be read."""

import io

import pytest
from PIL import Image

from data_prep.build import build
from data_prep.options import Options
from data_prep.sources.torchvision import TorchvisionSource
from pipeline.core.errors import ConfigError, DataError
from tests.unit.data_prep.samples import picture, png
from tests.unit.data_prep.test_build import lines


class Odd(list):
    """A data set whose samples cannot all be read, and are not all what a PNG holds."""

    classes = ("a", "b", "c", "d")

    def __init__(self, root):
        cmyk, broken = picture(1).convert("CMYK"), io.BytesIO(png(2)[:60])
        super().__init__([lambda: picture(0), lambda: cmyk, lambda: Image.open(broken).convert("RGB"), self.fails])

    def fails(self):
        raise KeyError("annotation 17")

    def __getitem__(self, number):
        return super().__getitem__(number)(), number


def test_what_torchvision_cannot_read_is_rejected(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "FakeData", Odd)
    built = build(TorchvisionSource("FakeData", str(tmp_path), {"train": {}}), tmp_path / "out", Options({}))
    assert built.counts.samples == 2
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert [r.split(":")[0] for r in reasons] == ["torchvision cannot read it"] * 2 and "annotation 17" in reasons[1]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ModuleNotFoundError("No module named 'pycocotools'"), ConfigError, "needs another package.*pycocotools"),
        (KeyError("images"), DataError, "cannot be read: KeyError: 'images'"),
        (EOFError("Ran out of input"), DataError, "cannot be read: EOFError"),
        (PermissionError(13, "Permission denied"), DataError, "is not at .*Permission denied"),
    ],
)
def test_a_data_set_that_torchvision_cannot_open(tmp_path, monkeypatch, error, kind, words):
    from torchvision import datasets

    class FakeData:
        def __init__(self, root):
            raise error

    monkeypatch.setattr(datasets, "FakeData", FakeData)
    with pytest.raises(kind, match=words):
        TorchvisionSource("FakeData", str(tmp_path / str(type(error))), {"train": {}})
