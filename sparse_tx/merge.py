"""A composed config into its dataclass, with each mistake as one line that names the key and what would be right."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_tx.errors import UserError

Config = TypeVar("Config")


def typed(cfg: DictConfig, schema: type[Config], *, shared: bool = False) -> Config:
    """Merge into the schema: unknown keys, wrong types and missing values become one line each.

    shared: the config holds keys of another command too, as a file of the debug group does; they are left out.
    """
    try:
        given = OmegaConf.to_container(cfg)
        assert isinstance(given, dict)
        given.pop("hydra", None)
        if shared:
            known = _keys(schema)
            given = {k: _only(v, known, f"{k}.") for k, v in given.items() if k in known}
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{missing[0]} is missing: add {missing[0]}=... to the command")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema) or str(error)) from None
    assert isinstance(config, schema)
    return config


def _explain(error: OmegaConfBaseException, schema: type) -> str | None:
    key = str(error.full_key or error.key or "")
    what = str(error).splitlines()[0]
    known = sorted(_keys(schema))
    if key and key not in known:
        return explain_unknown(key, schema)
    return f"{key}: {what}"


def explain_unknown(key: str, schema: type) -> str | None:
    """One line on a key that the schema has not, with what it may have meant; None if the schema has it."""
    known = sorted(_keys(schema))
    if key not in known:
        siblings = _siblings(key, known)
        near = difflib.get_close_matches(key.rpartition(".")[2], [k.rpartition(".")[2] for k in siblings], n=1)
        meant = [k for k in siblings if k.rpartition(".")[2] in near]
        hint = f"did you mean {meant[0]}?" if meant else f"known there: {', '.join(siblings)}"
        return f"{key} is not a key of this config: {hint}"
    return None


def flat_fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Every key of a schema, dotted, with its type and field; what holds keys of its own comes before them."""
    types = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        yield prefix + f.name, types[f.name], f
        for inner in (types[f.name], *get_args(types[f.name])):  # also of `Section | None`
            if dataclasses.is_dataclass(inner):
                assert isinstance(inner, type)
                yield from flat_fields(inner, f"{prefix}{f.name}.")


def _keys(schema: type) -> list[str]:
    return [key for key, _, _ in flat_fields(schema)]


def _only(value: Any, known: list[str], prefix: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _only(v, known, f"{prefix}{k}.") for k, v in value.items() if prefix + k in known}


def _siblings(key: str, known: list[str]) -> list[str]:
    prefix = key.rpartition(".")[0]
    return [k for k in known if k.rpartition(".")[0] == prefix] or [k for k in known if "." not in k]
