"""What several tests of the stream stand on."""

import pytest

from pipeline.core import location
from pipeline.data import storage
from tests.unit.data.server import Server


@pytest.fixture
def server(local, monkeypatch):
    """Serves the data set ``local`` of a test's module over HTTP, as badly as it is told to."""
    monkeypatch.setattr(storage, "_PAUSE", 0.01)
    made = Server(local.root)
    yield made
    made.released.set()
    made.shutdown()
    made.server_close()
    location.filesystem.cache_clear()
