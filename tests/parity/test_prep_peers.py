"""Shards in other hands: Hugging Face datasets reads ours, and what the real img2dataset wrote is trained on."""

import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.index import index
from data_prep.options import Options
from data_prep.verify import verify
from tests.unit.data_prep.samples import ListSource, encoded, inline, picture

IMG2DATASET = shutil.which("img2dataset", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
SAMPLES = 40


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets_reads_every_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed (make parity)")
    records = [r.__class__(r.key, r.identity, r.image, label=i % 2, caption=f"c{i}") for i, r in enumerate(inline(10))]
    build(ListSource(records, ("a", "b")), tmp_path / "out", Options({}, shard_samples=4))
    shards = sorted(str(p) for p in (tmp_path / "out/train").glob("*.tar"))
    stream = datasets.load_dataset("webdataset", data_files={"train": shards}, split="train", streaming=True)
    rows = list(stream)
    assert [row["__key__"] for row in rows] == [r.key for r in records]
    assert [row["txt"] for row in rows] == [r.caption for r in records]
    assert [int(row["cls"]) for row in rows] == [r.label for r in records]
    assert all(row["png"].size == (24, 20) for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_open_clip_counts_samples_by_sizes_json(tmp_path):
    pytest.importorskip("pandas", reason="pandas, which open_clip imports, is not installed (make parity)")
    theirs = pytest.importorskip("open_clip_train.data", reason="open_clip is not installed (make parity)")
    build(ListSource(inline(10)), tmp_path / "out", Options({}, shard_samples=4))
    shards = f"{tmp_path}/out/train/train-{{000000..000002}}.tar"
    assert theirs.get_dataset_size(shards) == (10, 3)
    assert theirs.get_dataset_size(shards.replace("000002", "000001")) == (8, 2)
    (tmp_path / "out/train/sizes.json").unlink()
    index(str(tmp_path / "out/train"))
    assert theirs.get_dataset_size(shards) == (10, 3)


class _Images(BaseHTTPRequestHandler):
    """One JPEG per number; the last one is not there."""

    def do_GET(self):
        number = int(self.path.strip("/").split(".")[0])
        self.send_response(404 if number == SAMPLES else 200)
        self.end_headers()
        self.wfile.write(encoded(picture(number, (60, 50)), "JPEG"))

    def log_message(self, *arguments):
        """Quiet."""


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.skipif(IMG2DATASET is None, reason="img2dataset is not installed (make parity)")
def test_what_img2dataset_wrote_is_indexed_and_trained_on(tmp_path, address):
    (tmp_path / "u.csv").write_text(
        "url,text\n" + "".join(f"{address}/{i}.jpg,caption {i}\n" for i in range(SAMPLES + 1))
    )
    options = {
        "url_list": tmp_path / "u.csv",
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "text",
        "output_format": "webdataset",
        "output_folder": tmp_path / "out",
        "processes_count": 1,
        "thread_count": 4,
        "image_size": 48,
        "number_sample_per_shard": 12,
    }
    command = [IMG2DATASET, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=240, env=environment)

    manifest = index(str(tmp_path / "out"))
    assert manifest.samples == SAMPLES and len(manifest.shards) == 4
    assert set(manifest.fields) == {"image", "caption", "metadata"}
    assert verify(str(tmp_path / "out"), decode=1).problems == {}

    from tests.integration import runs

    ended = runs.run(1, "mae", runs.overrides(tmp_path / "run", tmp_path / "out"))
    assert runs.codes(ended) == [0], ended
