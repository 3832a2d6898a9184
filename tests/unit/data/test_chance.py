"""Augmentations that come again: functions of the sample's key, the augmentation and their seed, of nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from pipeline.config.schema import Data, Image
from pipeline.data.dataset import open_data
from pipeline.data.stream import open_stream
from tests.unit.data.shards import write_data
from tests.unit.data.test_device import VIEWS, photographs

COUNT = 24


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("main"), [10, 14], photographs)


def seen(main, epochs=5, seed=1, batch=8, **more):
    """Image by key's number and epoch, of a run's first epochs; the label of a sample is its number modulo 7."""
    data = Data(train=main.root, fields=("image",), image=Image(size=8), workers=0, **more)
    manifest = open_data(data)
    ids = getattr(manifest, "kept", range(manifest.samples))
    stream = open_stream(data, manifest, seed=seed, global_batch=batch, micro_batch=batch, rank=0, world=1)
    found = {}
    for (one,) in itertools.islice(stream.batches(0), epochs * manifest.samples // batch):
        for number, epoch, image in zip(one["id"].tolist(), one["epoch"].tolist(), one["image"], strict=True):
            found[int(ids[number]), epoch] = image
    stream.close()
    return found


def alike(left, right):
    assert left.keys() == right.keys() and len(left) >= COUNT
    return [torch.equal(left[key], right[key]) for key in left]


def test_after_so_many_epochs_the_same_crops_come_again(main):
    found = seen(main, augmentations=2)
    for number in range(COUNT):
        assert torch.equal(found[number, 0], found[number, 2]) and torch.equal(found[number, 1], found[number, 3])
    assert sum(torch.equal(found[number, 0], found[number, 1]) for number in range(COUNT)) < 4
    always = seen(main)
    assert sum(torch.equal(always[number, 0], always[number, 2]) for number in range(COUNT)) < 4


def test_the_runs_seed_has_no_part_in_them_and_their_own_has(main):
    found = seen(main, augmentations=2)
    assert all(alike(found, seen(main, seed=5, augmentations=2)))
    assert sum(alike(found, seen(main, augmentations=2, augmentation_seed=5))) < COUNT
    assert sum(alike(seen(main), seen(main, seed=5))) < COUNT


def test_a_part_of_the_data_set_and_other_shards_see_the_same(main, tmp_path):
    """Numbers are others there, keys are the same."""
    whole = seen(main, augmentations=2)
    keep = tmp_path / "keep.txt"
    keep.write_text("".join(f"{number:06d}\n" for number in range(5, 21)))
    part = seen(main, augmentations=2, keep=str(keep))
    assert len(part) == 16 * 5 and all(torch.equal(whole[key], image) for key, image in part.items())
    again = write_data(tmp_path / "again", [3, 3, 18], photographs)
    assert all(alike(whole, seen(again, augmentations=2)))
    mixed = seen(main, batch=12, augmentations=2, epochs=1)
    assert all(torch.equal(whole[key], image) for key, image in mixed.items())


def test_both_ways_of_decoding_draw_alike(main):
    """On the device, crops are worked out anew from what is in the batch."""
    from pipeline.data.assemble import Assembler
    from pipeline.data.decode import ImageDecoder
    from pipeline.data.device import DeviceImages, Encoded
    from pipeline.data.reading import AugmentedReading
    from pipeline.data.stream import assemble_here

    reading = AugmentedReading(torch.tensor([[0, 4], [4, 7]]).numpy(), 3, 12, COUNT)
    batches = []
    for decode in ("loader", "device"):
        data = Data(train=main.root, fields=("image",), image=VIEWS, augmentations=3, decode=decode)
        filler = Assembler(main, data, 1, reading)
        images = {"": Encoded(ImageDecoder(VIEWS, filler.chance.seed), 0, filler.chance)}
        receive = DeviceImages(images, torch.device("cpu")) if decode == "device" else None
        batches.append([made.batch for made in assemble_here(filler, 0, receive)])
    for one, other in zip(*batches, strict=True):
        assert one["id"].tolist() == sorted(one["id"].tolist()) and one["epoch"].tolist() == [0, 1, 2] * (
            len(one["id"]) // 3
        )
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["image2"], other["image2"])


def test_a_seed_without_augmentations_is_refused():
    with pytest.raises(ValidationError, match="set augmentations, or remove it"):
        Data(train="x", augmentation_seed=3)
