import copy
import tomllib
from functools import reduce
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from pipeline.config.load import dump
from pipeline.config.mistakes import Mistakes, validate
from pipeline.config.schema import RunConfig, Strict, SuiteConfig

RUN = {
    "run": {"folder": "runs/x", "length": "2ep", "global_batch": 8},
    "data": {"train": "shards", "image": {"size": [32, 32], "scale": [0.2, 1.0]}},
    "objective": {"name": "mae", "mask_ratio": 0.75},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "engine": {"name": "deepspeed", "micro_batch": 4},
}
SUITE = {"streams": {"train": "a"}, "evals": [{"name": "knn", "k": [5]}, {"name": "linear_probe"}]}
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def paths(value):
    """Every path into nested tables and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (key,)
        yield from ((key, *path) for path in paths(inner))


@pytest.mark.parametrize(("model", "good"), [(RunConfig, RUN), (SuiteConfig, SUITE)])
@given(data=st.data())
def test_whatever_stands_there_it_is_sound_or_a_mistake_with_its_place(model, good, data):
    values = copy.deepcopy(good)
    path = data.draw(st.sampled_from(sorted(paths(values), key=str)))
    holder = reduce(lambda inner, key: inner[key], path[:-1], values)
    holder[path[-1]] = data.draw(VALUES)
    try:
        text = dump(validate(model, values, "x.toml"))
        assert dump(validate(model, tomllib.loads(text), "again.toml")) == text
    except Mistakes as mistakes:
        assert mistakes.problems
        assert all(problem.startswith(path[0]) for problem in mistakes.problems)


class Inner(Strict):
    """A part."""

    size: int | Annotated[tuple[int, int], Field()] = 1
    mode: Literal["a", "b"] | None = None
    steps: Annotated[int, Field(multiple_of=4)] = 4


class Plain(Strict):
    """One kind of loss."""

    kind: Literal["plain"]
    weight: float = 1.0


class Soft(Strict):
    """Another kind, under two names."""

    kind: Literal["soft", "softer"]
    temperature: float = 1.0
    inner: Inner = Inner()


Kinds = Annotated[Plain | Soft, Field(discriminator="kind")]


class Outer(Strict):
    """The whole."""

    losses: dict[str, Kinds] = Field(default_factory=dict)
    listed: tuple[Kinds, ...] = ()
    first: Kinds | None = None

    parts: Annotated[tuple[Inner, ...], Field(min_length=1)]
    named: dict[str, Inner] = Field(default_factory=dict)
    one: Inner | str = "x"


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({}, ["parts: missing; expected a list"]),
        ({"parts": []}, ["parts: expected a list of at least 1, found []"]),
        ({"parts": [{"sise": 1}]}, ["parts[0].sise: unknown key (did you mean 'size'?)"]),
        ({"parts": [{}, {"mode": "c"}]}, ["parts[1].mode: expected 'a' or 'b', found \"c\""]),
        ({"parts": [{"size": [1, 2.5]}]}, ["parts[0].size[1]: expected a whole number, found 2.5"]),
        ({"parts": [{"size": {}}]}, ["parts[0].size: expected a whole number or a list of 2, found a table"]),
        ({"parts": [{"steps": 3}]}, ["parts[0].steps: input should be a multiple of 4, found 3"]),
        (
            {"parts": [{}], "named": {"k": {"size": "a"}}},
            ['named.k.size: expected a whole number or a list of 2, found "a"'],
        ),
        ({"parts": [{}], "one": 3}, ["one: expected a table or text, found 3"]),
        ({"parts": [{}], "one": {"sizes": 3}}, ["one.sizes: unknown key (did you mean 'size'?)"]),
        ({"parts": [3]}, ["parts[0]: expected a table, found 3"]),
        *(
            ({"parts": [{}], **beside(loss)}, [f"{where}.{said}"])
            for where, beside in {
                "losses.a": lambda loss: {"losses": {"b": {"kind": "plain"}, "a": loss}},
                "listed[1]": lambda loss: {"listed": [{"kind": "plain"}, loss]},
                "first": lambda loss: {"first": loss},
            }.items()
            for loss, said in (
                ({"kind": "soft", "temprature": 2.0}, "temprature: unknown key (did you mean 'temperature'?)"),
                ({"kind": "softer", "weight": 2.0}, "weight: unknown key (there are: kind, temperature, inner)"),
                ({"kind": "plain", "inner": {}}, "inner: unknown key (there are: kind, weight)"),
                ({"kind": "soft", "inner": {"sise": 1}}, "inner.sise: unknown key (did you mean 'size'?)"),
                ({"kind": "soft", "temperature": "a"}, 'temperature: expected a number, found "a"'),
                (
                    {"kind": "sof"},
                    "kind: expected 'plain' or 'soft' or 'softer', found \"sof\" (did you mean 'soft'?)",
                ),
                ({"kind": ["soft"]}, "kind: expected 'plain' or 'soft' or 'softer', found [\"soft\"]"),
                ({"temperature": 1.0}, "kind: missing; expected 'plain' or 'soft' or 'softer'"),
            )
        ),
        ({"parts": [{}], "named": {"k": "y" * 90}}, [f'named.k: expected a table, found "{"y" * 56}...']),
    ],
)
def test_lines(values, problems):
    with pytest.raises(Mistakes) as caught:
        validate(Outer, values, "x.toml")
    assert list(caught.value.problems) == problems


def test_prefix_and_title():
    with pytest.raises(Mistakes, match=r"^x\.toml: 1 mistake\n  evals\[2\]\.mode: expected"):
        validate(Inner, {"mode": "c"}, "x.toml", prefix=("evals", 2))


class Small(Strict):
    """The kind that is meant where none is named."""

    name: Literal["small"] = "small"
    width: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _even(self) -> "Small":
        if self.width % 2:
            raise ValueError("an odd width")
        return self


class Large(Strict):
    name: Literal["large"]
    layers: int = 2
    norm: Literal["batch", "group"] = "batch"


class Network(Strict):
    network: Small | Large = Small()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"widht": 2}, "widht: unknown key (did you mean 'width'?)"),
        ({"width": 2, "layers": 3}, "layers: unknown key (there are: name, width)"),
        ({"width": 0}, "width: expected a number >= 1, found 0"),
        ({"width": 3}, "an odd width"),
        ({"name": "large", "layer": 3}, "layer: unknown key (did you mean 'layers'?)"),
        ({"name": "large", "width": 3}, "width: unknown key (there are: name, layers, norm)"),
        ({"name": "large", "layers": "2"}, 'layers: expected a whole number, found "2"'),
    ],
)
def test_a_mistake_is_that_of_the_kind_which_is_meant(given, problem):
    """Of kinds that are told apart by a word which one of them need not be given, the others' mistakes are none."""
    with pytest.raises(Mistakes) as caught:
        validate(Network, {"network": given}, "x.toml")
    (told,) = caught.value.problems
    assert told in (f"network.{problem}", f"network: {problem}")
