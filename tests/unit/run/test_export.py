import torch

from pipeline.core.protocols import Export
from pipeline.nn.weights import read
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
