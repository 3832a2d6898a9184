"""A run whose batches hold two data sets, and what the stream counts, through the program's own entry."""

from pathlib import Path

from tests.integration.runs import codes, metrics, overrides, run
from tests.unit.data.test_text import tokenizer


def test_two_data_sets_and_events_in_the_metrics(glyphs, tmp_path):
    """The digest covers both, and with the counts it is the same on one rank and on two."""
    words = tmp_path / "words.json"
    words.write_bytes(tokenizer())
    captions = [f"data.captions.tokenizer='{words}'", "data.captions.length=6"]
    short = [*captions, "objective.length=6", "engine.name=accelerate", "run.length=4ba"]
    pair = [*short, f"data.beside.target.path='{glyphs / 'val'}'"]

    def lines(name: str, world: int, settings: list[str]) -> dict[int, dict]:
        folder: Path = tmp_path / name
        assert codes(run(world, "clip", overrides(folder, glyphs / "train", *settings))) == [0] * world
        return metrics(folder)

    one, two, alone = lines("one", 1, pair), lines("two", 2, pair), lines("alone", 1, short)
    assert sum(line["truncated_texts"] for line in one.values()) > 8
    for step, line in one.items():
        assert line["replaced_samples"] == line["empty_texts"] == 0
        for name in ("truncated_texts", "data_digest"):
            assert two[step][name] == line[name], (step, name)
        assert alone[step]["truncated_texts"] == line["truncated_texts"]
        assert alone[step]["data_digest"] != line["data_digest"]
