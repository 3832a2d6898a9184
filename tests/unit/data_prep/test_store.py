"""Writing to fsspec targets gives the same files as to a folder."""

from dataclasses import replace

import fsspec
import pytest

from data_prep.build import build
from data_prep.index import index
from data_prep.options import Options
from data_prep.store import open_store
from data_prep.verify import verify
from pipeline.core.errors import ConfigError
from tests.unit.data_prep.samples import ListSource, inline, tree
from tests.unit.data_prep.test_build import _stop_after


def remote_tree(name):
    fs = fsspec.filesystem("memory")
    return {path.removeprefix(f"/{name}/"): fs.cat_file(path) for path in fs.find(f"/{name}")}


OPTIONS = Options({"val": 0.3}, shard_samples=3)


def source():
    return ListSource([replace(r, caption="x") for r in inline(12)])


def test_fsspec_target(tmp_path):
    build(source(), tmp_path / "local", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        build(source(), "memory://remote", OPTIONS, progress=_stop_after(9))
    assert any(name.startswith(".build/") for name in remote_tree("remote"))
    build(source(), "memory://remote", OPTIONS)
    assert remote_tree("remote") == tree(tmp_path / "local")
    assert verify("memory://remote/train", decode=1).problems == {}
    before = remote_tree("remote")["train/manifest.json"]
    assert index("memory://remote/train").fingerprint in before.decode()
    build(replace(source(), name="more", records=inline(20)[12:]), "memory://remote", OPTIONS, append=True)
    assert verify("memory://remote/train").problems == {}


def test_unknown_scheme():
    with pytest.raises(ConfigError, match="install fsspec"):
        open_store("nonsense://x")


def test_two_builds_at_once_are_refused(tmp_path):
    def another(counts):
        with pytest.raises(ConfigError, match="another process is building"):
            build(source(), tmp_path / "out", OPTIONS)

    build(source(), tmp_path / "out", OPTIONS, progress=another)
    build(source(), tmp_path / "whole", OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
