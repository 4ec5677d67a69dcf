"""How a small target is shaped and trained: defaults, and overrides ``name=value``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from koala_bench.common.reading import first_problem
from koala_bench.common.suggestions import did_you_mean
from koala_bench.errors import KoalaBenchError

SHAPE = ("layers", "width", "intermediate", "attention_heads", "vocabulary", "positions")
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PretrainOptions:
    """Shape of the target and how it is trained. Sizes are in tokens, layers and units."""

    layers: Positive = 14
    width: Positive = 192
    intermediate: Positive = 512
    attention_heads: Positive = 3
    vocabulary: Annotated[int, Field(ge=259, le=1 << 16)] = 4096  # all bytes and three special ones; two bytes an id
    positions: Positive = 4096
    row_tokens: Positive = 256  # rows are short while the rate is stable: attention is a third of the cost at 512
    decay_row_tokens: Positive = 512  # and long while it falls, so that second turns lie at trained positions
    step_tokens: Positive = 8192
    steps: Positive = 2000
    warmup_steps: Positive = 50
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    matrix_rate: Rate = 0.02
    vector_rate: Rate = 3e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    rate: Rate = 1.0  # factor on both rates; less than one where an earlier target goes on
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.width % (2 * self.attention_heads):
            raise ValueError(
                f"a width of {self.width} cannot be shared by {self.attention_heads} attention heads: each needs the"
                " same even number of units"
            )
        if (longest := max(self.row_tokens, self.decay_row_tokens)) > min(self.positions, self.step_tokens):
            raise ValueError(f"a row of {longest:,} tokens is longer than positions or step_tokens")
        return self

    @property
    def decay_steps(self) -> int:
        """Last steps, over which the learning rate falls to zero."""
        return max(1, round(self.decay_fraction * self.steps))


SETTABLE = tuple(asdict(PretrainOptions()))


def with_settings(options: PretrainOptions, settings: Sequence[str]) -> PretrainOptions:
    """Options with overrides ``name=value`` in place. Raises KoalaBenchError where no such option, no number, or sizes
    that do not fit together."""
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, given[name] = setting.partition("=")
        if not equals or name not in SETTABLE:
            known = did_you_mean(name, SETTABLE, f"Known are {', '.join(SETTABLE)}.")
            raise KoalaBenchError(f"--set {setting} is no override of the pretraining.", f"Write name=value. {known}")
    try:
        return PretrainOptions(**{**asdict(options), **given})  # pydantic reads the numbers
    except ValidationError as error:
        shown = " ".join(f"--set {setting}" for setting in settings)
        raise KoalaBenchError(f"{shown}: {first_problem(error)}.", "Change --set.") from error
