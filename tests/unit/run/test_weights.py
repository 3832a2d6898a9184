import pytest

from pipeline.core.errors import ConfigError
from pipeline.run.weights import parse_weights


def test_weights_by_name_or_width():
    assert [parse_weights(text) for text in ("model", "ema", "0.05")] == ["model", "ema", 0.05]


@pytest.mark.parametrize("text", ["emma", "0", "0.3", "-1", "nan", ""])
def test_other_weights_are_refused(text):
    with pytest.raises(ConfigError, match="model, ema, or the relative width"):
        parse_weights(text)
