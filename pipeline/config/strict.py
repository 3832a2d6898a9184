"""What all configuration is built of: strict tables, and kinds of values. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Base of all configuration: frozen, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # a component's own settings may be infinite
    )


Text = Annotated[str, Field(min_length=1)]


def _written_out(path: str) -> str:
    if path.startswith("~"):
        raise ValueError(f"{path!r}: ~ is not replaced, and would be the name of a folder; write the path out")
    return path


Folder = Annotated[Text, AfterValidator(_written_out)]
"""A folder that is made if it is not there."""
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Width = Annotated[float, Field(gt=0, lt=0.28)]
"""Of a power-function average, as a part of the run so far."""
Precision = Literal["bf16", "fp32"]
"""Of the computation: "bf16" is autocast over weights in fp32."""
Weights = Width | Literal["model", "ema"]
"""Which weights of a checkpoint: as trained, their moving average, or their power-function average of a width."""


class Component(BaseModel):
    """A component by name with settings of its own: ``name = "mae"`` and whatever its ``Config`` allows."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Text
    """File name of the component, without .py."""

    @property
    def settings(self) -> dict[str, Any]:
        """All but the name, for the component's ``Config``."""
        return dict(self.model_extra or {})
