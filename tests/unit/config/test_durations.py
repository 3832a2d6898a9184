import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.durations import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("90ep", 90, "ep"),
        ("0.5ep", 0.5, "ep"),
        ("500ba", 500, "ba"),
        ("20kba", 20_000, "ba"),
        ("12.8Gsa", 12_800_000_000, "sa"),
        ("1.1Gsa", 1_100_000_000, "sa"),
        ("5%", 5, "%"),
        (" 5 % ", 5, "%"),
        ("3 ep", 3, "ep"),
    ],
)
def test_reads(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    "text", ["", "90", "ep", "90 epochs", "-1ep", "1e3ba", "5k%", "1.ep", ".5ep", "1Tsa", "\u0663ep"]
)
def test_refuses(text):
    with pytest.raises(ValueError, match="write it like"):
        Duration.parse(text)


@given(st.floats(min_value=0, max_value=1e15), st.sampled_from(["ep", "ba", "sa", "%"]))
def test_text_gives_it_back(value, unit):
    duration = Duration(abs(value), unit)
    assert Duration.parse(str(duration)) == duration


def test_text_is_short():
    assert [str(Duration.parse(t)) for t in ("12.8Gsa", "500ba", "5%", "1500sa", "0ba")] == [
        "12.8Gsa",
        "500ba",
        "5%",
        "1.5ksa",
        "0ba",
    ]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("90ep", 90 * 25),
        ("0.5ep", 12),  # 12.5, to the even neighbour
        ("7ba", 7),
        ("640sa", 10),
        ("1sa", 1),  # less than half a step, but not nothing
        ("10%", 30),
        ("0ba", 0),
        ("0%", 0),
    ],
)
def test_steps(text, steps):
    assert Duration.parse(text).steps(global_batch=64, steps_per_epoch=25, total_steps=300) == steps
