"""What a sweep varies: the command's overrides, each one value or several, in their order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from sparse_tx.errors import UserError


@dataclass(frozen=True)
class Axis:
    """A key and its values as Hydra's text; one value where the key is fixed, none where it is an interval."""

    key: str
    values: tuple[str, ...]
    low: float | None = None
    high: float | None = None
    step: float | None = None  # of a range, whose values are listed too
    log: bool = False

    @property
    def fixed(self) -> bool:
        return len(self.values) == 1

    def override(self, value: Any) -> str:
        return f"{self.key}={value}"


def read_space(arguments: Iterable[str], params: Mapping[str, Any], configs: Path) -> list[Axis]:
    """The axes of a command line and of `sweep.params`, which give way to it. configs: for glob(*) over a group."""
    given = {axis.key: axis for axis in (_axis(argument, configs) for argument in arguments)}  # the last one holds
    listed = [_axis(f"{key}={value}", configs) for key, value in params.items() if key not in given]
    return [*listed, *given.values()]


def grid(space: Sequence[Axis]) -> list[tuple[str, ...]]:
    """The overrides of each member, the last axis running fastest."""
    for axis in space:
        if not axis.values:
            raise UserError(
                f"{axis.key} over an interval has no end of values: add sweep.trials=20 to search it (pip install "
                "'sparse-tx[sweep]'), or list the values"
            )
    return list(itertools.product(*(tuple(axis.override(v) for v in axis.values) for axis in space)))


def _axis(argument: str, configs: Path) -> Axis:
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise UserError(f"{argument} cannot be parsed: {str(error).splitlines()[0]}") from None
    key = override.get_key_element()
    if not override.is_sweep_override():
        return Axis(key, (override.get_value_element_as_str(),))
    found = override.value()
    if isinstance(found, Glob):
        options = sorted(path.stem for path in (configs / override.key_or_group).glob("*.yaml"))
        chosen = tuple(found.filter(options))
        if not chosen:
            raise UserError(f"{argument} names no option of {override.key_or_group}: known are {', '.join(options)}")
        return Axis(key, chosen)
    if isinstance(found, IntervalSweep):
        assert found.start is not None
        assert found.end is not None
        return Axis(key, (), found.start, found.end, log="log" in found.tags)
    values = tuple(override.sweep_string_iterator())
    if isinstance(found, RangeSweep):
        return _range(override, key, values)
    return Axis(key, values)


def _range(override: Override, key: str, values: tuple[str, ...]) -> Axis:
    if not values:
        raise UserError(f"{override.input_line} holds no value: its stop must lie beyond its start")
    numbers = [float(v) for v in values]
    step = numbers[1] - numbers[0] if len(numbers) > 1 else None
    return Axis(key, values, min(numbers), max(numbers), None if step is None else abs(step))
