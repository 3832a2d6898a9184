"""Images decoded by the rank instead of the loader: the same crops, flips and, on a CPU, the same pixels."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from pipeline.config.schema import Beside, Data, Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from pipeline.data import device as on_device
from pipeline.data.assemble import Assembler
from pipeline.data.decode import ImageDecoder
from pipeline.data.device import DeviceImages, Encoded, check_jpeg
from pipeline.data.order import Order
from pipeline.data.reading import TrainReading
from pipeline.data.stream import assemble_here, open_stream
from pipeline.data.together import Together
from pipeline.data.workers import Workers
from tests.unit.data.shards import encode, picture, write_data
from tests.unit.data.test_stream import assert_same, open_rank
from tests.unit.data_prep.samples import encoded

CPU = torch.device("cpu")
VIEWS = Image(size=(8, 6), views=2)


def photographs(number):
    """Some of them are to be turned."""
    exif = PillowImage.Exif()
    exif[0x0112] = number % 9
    file = encoded(PillowImage.fromarray(picture(number, (40, 52))), "JPEG", exif=exif)
    return {"cls": b"%d" % (number % 7), "jpg": file}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), [10, 14, 8], photographs)


def assembler(data, image=VIEWS):
    settings = Data(train=data.root, fields=("image", "label"), image=image, decode="device")
    return Assembler(data, settings, 1, TrainReading(Order(np.array(data.starts), 1, 16, 2, 4, "drop"), 16, 0, 1))


@pytest.mark.parametrize("image", [VIEWS, Image(size=8, crop="center"), Image(size=(6, 8), crop="resize")])
def test_same_batches_as_from_the_loader(data, image):
    receive = DeviceImages({"": Encoded(ImageDecoder(image, 1), 0)}, CPU)
    found = [made.batch for made in itertools.islice(assemble_here(assembler(data, image), 0, receive), 2)]
    expected = [parts[0] for parts in itertools.islice(open_rank(data, image=image, micro=16, lanes=2).batches(0), 2)]
    assert_same(expected, found)


def test_crops_of_a_data_set_beside_belong_to_its_own_ids(data):
    """In the batch its ids go on where those of the first one end."""
    plan = assembler(data).reading
    settings = {"train": data.root, "fields": ("image",), "image": VIEWS}
    both = [
        Together(
            {prefix: Assembler(data, Data(decode=decode, **settings), 1, plan) for prefix in ("", "target_")},
            {"": 1, "target_": 1},
        )
        for decode in ("device", "loader")
    ]
    sources = {"": Encoded(ImageDecoder(VIEWS, 1), 0), "target_": Encoded(ImageDecoder(VIEWS, 1), data.samples)}
    found, expected = (
        next(assemble_here(filler, 0, receive)).batch
        for filler, receive in zip(both, (DeviceImages(sources, CPU), None), strict=True)
    )
    assert_same([expected], [found])


def test_files_come_through_shared_memory(data):
    receive = DeviceImages({"": Encoded(ImageDecoder(VIEWS, 1), 0)}, CPU)
    workers = Workers(assembler(data), 1, receive)
    found = [made.batch for made in itertools.islice(workers.batches(0), 4)]
    workers.close()
    expected = [made.batch for made in itertools.islice(assemble_here(assembler(data), 0, receive), 4)]
    assert_same(expected, found)


def test_files_that_cannot_be_decoded(monkeypatch):
    with pytest.raises(ValueError, match=r'not a JPEG, which data\.decode = "device" needs; set it to "loader"'):
        check_jpeg(memoryview(encode(picture(0), "png")))
    with pytest.raises(ValueError, match="CMYK"):
        check_jpeg(memoryview(encoded(PillowImage.new("CMYK", (8, 8)), "JPEG")))
    file = encode(picture(0), "jpg")
    with pytest.raises(ValueError, match="not a readable JPEG"):
        check_jpeg(memoryview(file[:30]))
    monkeypatch.setattr(on_device, "MAX_BYTES", len(file) - 1)
    with pytest.raises(ValueError, match=r'data\.decode = "device" takes'):
        check_jpeg(memoryview(file))


def test_a_file_that_only_the_device_finds_broken_is_named(data, tmp_path):
    def make(number):
        parts = photographs(number)
        without_tables = parts["jpg"].replace(b"\xff\xdb", b"\xff\xef")
        return parts | {"jpg": without_tables if number == 5 else parts["jpg"]}

    broken = write_data(tmp_path, [16], make)
    receive = DeviceImages({"": Encoded(ImageDecoder(VIEWS, 1), 0)}, CPU)
    settings = Data(train=broken.root, fields=("image",), image=VIEWS, decode="device")
    plan = TrainReading(Order(np.array(broken.starts), 1, 16, 1, 4, "drop"), 16, 0, 1)
    with pytest.raises(DataError, match=r'sample number 5: its JPEG cannot be decoded.*set data.decode = "loader"'):
        next(assemble_here(Assembler(broken, settings, 1, plan), 0, receive))


def test_without_a_gpu_it_is_refused(data):
    with pytest.raises(ConfigError, match=r'data\.decode = "device" needs a GPU, and this rank has none'):
        open_rank(data, decode="device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu(data, workers):
    """Pixels differ from libjpeg-turbo's by rounding; crops, flips, labels and ids do not."""
    settings = {"fields": ("image", "label"), "image": VIEWS, "workers": workers, "tail": "endless"}
    beside = {"target": Beside(path=data.root)}
    shape = {"seed": 1, "global_batch": 16, "micro_batch": 16, "rank": 0, "world": 1}
    streams = [
        open_stream(
            Data(train=data.root, decode=decode, beside=beside, **settings), load(data.root), **shape, device=device
        )
        for decode, device in (("device", torch.device("cuda")), ("loader", CPU))
    ]
    for (there,), (here,) in itertools.islice(zip(*(s.batches(0) for s in streams), strict=True), 4):
        assert there["image"].is_cuda and there["target_image2"].is_cuda and there["label"].is_pinned()
        assert there.keys() == here.keys()
        for name, value in here.items():
            difference = (there[name].cpu().double() - value.double()).abs()
            assert difference.mean() < 2 if "image" in name else difference.max() == 0
    for stream in streams:
        stream.close()
