import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import pipeline.dist.gather as gather
from pipeline.core.errors import DataError
from pipeline.core.evaluation import OWN
from pipeline.dist.group import process_group
from pipeline.suites.features import check_labels, extract
from tests.contracts.components import ListStream


class Sum(nn.Module):
    """Two features: the sum of all pixels, and of the first channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image):
        return (torch.stack([image.sum((1, 2, 3)), image[:, 0].sum((1, 2))], 1) * self.scale).to(torch.bfloat16)


def stream(samples, rank=0, world=1, batch=5):
    image = torch.randint(0, 2, (samples, 3, 2, 2), dtype=torch.uint8, generator=torch.manual_seed(0))
    return ListStream(image, torch.arange(samples) % 3, rank, world, batch)


@torch.no_grad()
def check_extraction():
    with process_group(timeout_minutes=1):
        rank, world = dist.get_rank(), dist.get_world_size()
        for samples in (1, 3, 7, 23):
            found = extract(Sum(), stream(samples, rank, world), [OWN], ("label", "image_digest"))
            image = stream(samples).image.float()
            assert torch.equal(found[OWN], torch.stack([image.sum((1, 2, 3)), image[:, 0].sum((1, 2))], 1))
            assert found[OWN].dtype == torch.float32
            assert torch.equal(found["label"], torch.arange(samples) % 3)
            digest = [tuple(row) for row in found["image_digest"].tolist()]
            pixels = [tuple(row) for row in image.flatten(1).tolist()]
            assert [digest.index(d) for d in digest] == [pixels.index(p) for p in pixels]
        if world == 2:
            with pytest.raises(DataError, match=r"hold 4 samples, not each of 2 once"):
                extract(Sum(), stream(2), [OWN], ("label",))


def test_labels_without_a_name_are_refused():
    check_labels(torch.tensor([0, 2]), ("a", "b", "c"))
    for label in ([0, 3], [-1, 0]):
        with pytest.raises(DataError, match=rf"labels run from {label[0]} to {label[1]}, but the manifest names 3"):
            check_labels(torch.tensor(label), ("a", "b", "c"))


@torch.no_grad()
def test_bf16_is_autocast_and_is_kept_so(lone_group):
    """The product in bf16, the norm after it in fp32, as autocast has it; the weights stay as they are."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), Float(), nn.Linear(12, 8), nn.LayerNorm(8))
    before = [p.clone() for p in encoder.parameters()]
    found = extract(encoder, stream(9), [OWN], (), "bf16")[OWN]
    x = stream(9).image.flatten(1).bfloat16()
    product = functional.linear(x, encoder[2].weight.bfloat16(), encoder[2].bias.bfloat16())
    expected = functional.layer_norm(product.float(), (8,)).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert all(
        p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(encoder.parameters(), before, strict=True)
    )
    exact = extract(encoder, stream(9), [OWN], ())[OWN]
    assert 0 < (exact - found.float()).abs().max() < 0.1


class Float(nn.Module):
    def forward(self, x):
        return x.float()


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
        extract(Sum(), Bare(stream(4).image, stream(4).label), [OWN], ("label",))


def test_rows_may_be_parts_of_wider_ones(lone_group):
    """As the single row of a short last batch, too, which counts as contiguous at any stride."""

    class Sliced(ListStream):
        def __iter__(self):
            wide = torch.arange(24).reshape(4, 6)
            for rows in (slice(0, 3), slice(3, 4)):
                cut = wide[rows, ::2]
                yield {"id": torch.arange(4)[rows], "cut": cut, "column": cut[:, 1]}

    found = extract(None, Sliced(stream(4).image, stream(4).label), [], ("cut", "column"))
    assert found["cut"].tolist() == [[6 * row + n for n in (0, 2, 4)] for row in range(4)]
    assert found["column"].tolist() == [2, 8, 14, 20]


@pytest.mark.world_size(2)
def test_what_one_rank_cannot_read_is_the_error_of_all():
    """And nobody waits for the one that cannot go on."""

    class Broken(ListStream):
        def __iter__(self):
            yield from list(super().__iter__())[:1]
            raise DataError("x-000007.tar is damaged")

    with process_group(timeout_minutes=1):
        whole, rank = stream(23), dist.get_rank()
        own = (Broken if rank == 1 else ListStream)(whole.image, whole.label, rank, 2)
        with pytest.raises(DataError, match=r"rank 1: x-000007\.tar is damaged"):
            extract(Sum(), own, [OWN], ())
