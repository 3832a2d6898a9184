"""Advice from figures that were made up."""

import pytest

from pipeline.record.advice import MEDIUM, Known, Score, advice, negative, recommended, spared


def known(samples=200, probe=0.8, untrained=0.2, **strategies):
    def scores(value):
        return {
            "knn/top1_k20": Score(value - 0.1, 0.02),
            "transferability/top1_blocks.1": Score(0.3, 0.02),
            "transferability/top1_blocks.3": Score(value, 0.02),
            "transferability/logme": Score(-0.5),
        }

    return Known(samples, 10, scores(probe), scores(untrained), {n: Score(*s) for n, s in strategies.items()})


@pytest.mark.parametrize(
    ("samples", "probe", "way"),
    [
        (999, 0.61, "frozen"),
        (999, 0.59, "partial"),
        (MEDIUM, 0.61, "lp_ft"),
        (19_999, 0.3, "partial"),
        (20_000, 0.7, "full"),
        (20_000, 0.1, "full"),
    ],
)
def test_without_trials_size_and_distance_decide(samples, probe, way):
    """Untrained 20 %: similar is whatever spares half of the 80 % of errors."""
    assert recommended(known(samples, probe))[0] == way
    assert spared(known(probe=0.6)) == pytest.approx(0.5)


def test_of_ways_as_good_as_the_best_the_cheapest_is_taken_whatever_the_table_says():
    name, why = recommended(known(50_000, frozen=(0.70, 0.02), partial=(0.79, 0.02), full=(0.80, 0.02)))
    assert name == "partial" and "79.0 % +- 2.0" in why and "full with 80.0 %" in why
    assert recommended(known(frozen=(0.7, 0.02), full=(0.8, 0.02)))[0] == "full"
    assert recommended(known(frozen=(0.5, 0.02), full=(0.6, 0.02), scratch=(0.7, 0.02)))[0] == "scratch"


def test_negative_transfer_is_named_where_it_is_measured_and_nowhere_else():
    assert negative(known(full=(0.6, 0.02), scratch=(0.62, 0.02))) == []  # no more than chance
    assert negative(known(full=(0.8, 0.02))) == []
    (worst,) = negative(known(frozen=(0.3, 0.02), full=(0.6, 0.02), scratch=(0.7, 0.02)))
    assert worst.startswith("the best from this encoder, full, reaches 60.0 %") and "reach 70.0 %" in worst
    (one,) = negative(known(frozen=(0.75, 0.02), full=(0.6, 0.02), scratch=(0.7, 0.02)))
    assert one.startswith("full fine-tuning reaches 60.0 %")
    (probe,) = negative(known(probe=0.2, untrained=0.4))
    assert probe.startswith("a probe of its last block reaches 20.0 %")


def test_all_figures_are_shown_and_the_cell_is_marked():
    text = advice(known(2000, frozen=(0.7, 0.02), scratch=(0.5, 0.01)))
    assert "2,000 labelled samples of 10 classes, 200.0 each: medium" in text
    assert "pretraining spares 75 % of a probe's errors: similar to" in text
    (marked,) = [line for line in text.split("\n") if "> " in line]
    assert marked.startswith("  medium  > the classifier first, then all from there (LP-FT)") and marked.count(">") == 1
    assert "80.0 % +- 2.0" in text and "20.0 % +- 2.0" in text and "-0.5" in text
    assert "recommended frozen: 70.0 % +- 2.0 on held-out samples" in text
    assert "negative" not in text
