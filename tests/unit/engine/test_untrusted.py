"""Nothing that lies in a checkpoint's folder is executed, whoever put it there."""

import ast
import hashlib
import json
import os
import pickle
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pipeline.core.errors import CheckpointError
from pipeline.dist.group import Place
from pipeline.engine.checkpoint import CheckpointStore, manifest_text
from pipeline.engine.fragments import whole
from pipeline.engine.saving import Saver

ROOT = Path(__file__).parents[3]
NAME = "rank-00000.safetensors"


class Attack:
    """Unpickling it runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def saved(tmp_path, lone_group):
    """A store with one checkpoint, and the file that an attack would make."""
    place = Place(0, 1, 0, torch.device("cpu"), timedelta(minutes=1))
    store = CheckpointStore(tmp_path / "checkpoints", place, print)
    saver = Saver(store, 1, lambda step: None)
    saver.save(1, [whole("model/w", torch.arange(6.0))], {"step": 1})
    saver.finish()
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Attack(mark)))
    assert mark.exists()  # the attack is one
    mark.unlink()
    return store, mark


def fill(store):
    tensor = torch.zeros(6)
    store.newest().fill([whole("model/w", tensor)], 0)
    return tensor


def forge(store, data):
    """Put ``data`` in the place of a rank's file, with bytes and hashes that fit."""
    folder = store.path(1)
    (folder / NAME).write_bytes(data)
    body = json.loads((folder / "checkpoint.json").read_text())
    body["files"][NAME] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    facts = {name: body[name] for name in ("files", "tensors", "state")}
    (folder / "checkpoint.json").write_bytes(manifest_text(facts))


def test_a_pickle_in_place_of_the_weights(saved):
    store, mark = saved
    (store.path(1) / NAME).write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        fill(store)
    assert not mark.exists()


def test_a_pickle_with_a_forged_hash(saved, tmp_path):
    store, mark = saved
    torch.save({"module": Attack(mark)}, tmp_path / "torch.pt")
    for data in (pickle.dumps(Attack(mark)), (tmp_path / "torch.pt").read_bytes()):
        forge(store, data)
        assert store.newest() is not None  # nothing shows that it is forged
        with pytest.raises((CheckpointError, SafetensorError)):
            fill(store)
        assert not mark.exists()


def test_pickles_beside_the_weights_are_not_looked_at(saved):
    store, mark = saved
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"):
        (store.path(1) / name).write_bytes(pickle.dumps(Attack(mark)))
    with zipfile.ZipFile(store.path(1) / "sitecustomize.zip", "w") as archive:
        archive.writestr("x.py", f"open({str(mark)!r}, 'w')")
    (store.path(1) / "zero_to_fp32.py").write_text(f"open({str(mark)!r}, 'w')")
    assert fill(store).tolist() == list(range(6))
    assert not mark.exists()


def calls(name):
    """Every call of a function or method of that name, with its keywords."""
    for room in ("pipeline", "launch", "data_prep"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                    yield f"{path}:{node.lineno}", {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_all_that_could_unpickle_is_told_not_to():
    loads = dict(calls("torch.load"))
    assert loads and all(keywords.get("weights_only") == "True" for keywords in loads.values()), loads
    arrays = dict(calls("np.load"))
    assert arrays and all(keywords.get("allow_pickle") == "False" for keywords in arrays.values()), arrays
    assert not [where for name in ("pickle.load", "pickle.loads", "load_checkpoint") for where, _ in calls(name)]
