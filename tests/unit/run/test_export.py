import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Export
from pipeline.nn.weights import read
from pipeline.run import export as module
from pipeline.run.export import write


def test_what_an_objective_offers_is_written_in_its_kind(tmp_path, capsys):
    weights = {"w": torch.arange(3.0)}
    write(tmp_path / "other" / "w.safetensors", Export(weights, "other.load(...)", {"made": "now"}))
    write(tmp_path / "other" / "config.json", Export('{"a": 1}', "its configuration"))
    write(tmp_path / "third" / "w.safetensors", Export(None, "third has no such block"))
    tensors, metadata = read(tmp_path / "other" / "w.safetensors")
    assert torch.equal(tensors["w"], weights["w"]) and metadata["made"] == "now"
    assert (tmp_path / "other" / "config.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "third").exists()
    said = capsys.readouterr().out
    assert "other.load(...)" in said and "third has no such block" in said


def test_a_file_is_no_folder_to_export_into(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "restore", lambda *args: None)
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match=r"cannot make the folder .*out: File exists; name another"):
        module.export(str(tmp_path), None, str(tmp_path / "out"))
