import pytest
import torch
import torch.distributed as dist
from torch import nn

import pipeline.dist.gather as gather
from pipeline.core.errors import DataError
from pipeline.core.evaluation import OWN
from pipeline.dist.group import process_group
from pipeline.evals._features import extract
from tests.contracts.components import ListStream


class Sum(nn.Module):
    """Two features: the sum of all pixels, and of the first channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image):
        return (torch.stack([image.sum((1, 2, 3)), image[:, 0].sum((1, 2))], 1) * self.scale).to(torch.bfloat16)


class OneClass:
    """A stream whose labels are of more classes than it names."""

    classes = ("only",)

    def __init__(self, whole):
        self.whole, self.samples = whole, whole.samples

    def __iter__(self):
        return iter(self.whole)


def stream(samples, rank=0, world=1, batch=5):
    image = torch.randint(0, 2, (samples, 3, 2, 2), dtype=torch.uint8, generator=torch.manual_seed(0))
    return ListStream(image, torch.arange(samples) % 3, rank, world, batch)


@torch.no_grad()
def check_extraction():
    with process_group(timeout_minutes=1):
        rank, world = dist.get_rank(), dist.get_world_size()
        for samples in (1, 3, 7, 23):
            features = extract(Sum(), stream(samples, rank, world), ("label", "image_digest"))[OWN]
            image = stream(samples).image.float()
            assert torch.equal(features.x, torch.stack([image.sum((1, 2, 3)), image[:, 0].sum((1, 2))], 1))
            assert features.x.dtype == torch.float32
            assert torch.equal(features.label, torch.arange(samples) % 3)
            digest = [tuple(row) for row in features.fields["image_digest"].tolist()]
            pixels = [tuple(row) for row in image.flatten(1).tolist()]
            assert [digest.index(d) for d in digest] == [pixels.index(p) for p in pixels]
        with pytest.raises(DataError, match=r"hold 4 samples, not each of 2 once" if world == 2 else r"labels run"):
            extract(Sum(), stream(2) if world == 2 else OneClass(stream(7)), ("label",))


@pytest.mark.world_size(1)
def test_features_on_one_rank():
    check_extraction()


@pytest.mark.world_size(2)
def test_features_on_two_ranks_even_when_one_has_nothing():
    check_extraction()


@pytest.fixture(params=[1, 70, 10**6])
def chunk_bytes(request):
    return request.param


@pytest.mark.world_size(3)
def test_ragged_rows_in_chunks_of_any_size(chunk_bytes):
    gather.CHUNK_BYTES = chunk_bytes
    with process_group(timeout_minutes=1):
        parts = [torch.arange(n * 4).reshape(n, 2, 2) + 100 * r for r, n in enumerate([5, 0, 2])]
        assert torch.equal(gather.gather_ragged(parts[dist.get_rank()]), torch.cat(parts))


def test_a_stream_without_labels_is_named(lone_group):
    class Bare(ListStream):
        def __iter__(self):
            yield {"image": self.image, "id": torch.arange(4)}

    with pytest.raises(DataError, match="needs labels"):
        extract(Sum(), Bare(stream(4).image, stream(4).label), ("label",))
