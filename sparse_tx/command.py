"""What the commands share: compose by Hydra, run, and turn a user's mistake into one message and exit code 1."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from sparse_tx.config import EvaluateConfig, ExportConfig, SampleConfig, TrainConfig, config_folder
from sparse_tx.errors import UserError
from sparse_tx.merge import explain_unknown
from sparse_tx.training.folders import override

_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it
SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig, "sample": SampleConfig, "export": ExportConfig}


def main(function: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run `function` on the config that the command line composes; in a sweep, on each of its members.

    A member of a sweep that fails is reported and the others go on; the exit code is 1 if any failed.
    """
    failed: list[str] = []

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
    def job(cfg: DictConfig) -> None:
        try:
            if cfg.get("sweep", {}).get("params"):
                raise UserError(f"sweep= varies {', '.join(cfg.sweep.params)}: add -m to the command")
            function(cfg)
        except UserError as error:  # Hydra would print where it came from
            sys.exit(f"error: {error}")
        except OSError as error:
            if error.errno not in _FULL:
                raise
            where = f": {error.filename}" if error.filename else ""
            sys.exit(f"error: {error.strerror}{where}; make room and start again")

    try:
        sys.argv[1:] = _checked(sys.argv[1:], SCHEMAS[config_name], failed)
        if _is_sweep(sys.argv[1:]):
            from sparse_tx.sweep.run import sweep

            failed += sweep(function, config_name, [a for a in sys.argv[1:] if a not in ("-m", "--multirun")])
        else:
            job()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        print("failed: " + "; ".join(failed), file=sys.stderr)
        sys.exit(1)


def _is_sweep(arguments: list[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def _checked(arguments: list[str], schema: type, failed: list[str]) -> list[str]:
    """The command line, its mistakes told in one line each before Hydra tells them in many.

    A member of a sweep that names an option which does not exist is taken out and counted as failed.
    """
    if {"-sc", "--shell-completion"} & set(arguments):
        return arguments
    sweep = _is_sweep(arguments)
    parser = OverridesParser.create()
    checked = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith(("-", "+", "~", "hydra")) or not equals:
            checked.append(argument)
            continue
        try:
            parser.parse_override(argument)
        except HydraException:
            quoted = override(key, value)
            raise UserError(
                f"{argument} cannot be parsed: quote the value, for Hydra and the shell: {quoted}"
            ) from None
        if (config_folder() / key).is_dir():
            argument = f"{key}={_known_options(key, value, sweep, failed)}"
        elif not key.startswith("logger.") and (unknown := explain_unknown(key, schema)) is not None:
            raise UserError(unknown)
        checked.append(argument)
    return checked


def _known_options(group: str, value: str, sweep: bool, failed: list[str]) -> str:
    if sweep and "(" in value:
        return value  # glob(*), choice(a,b): read with the rest of the sweep
    known = sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))
    named = [option.strip() for option in value.strip("[]").split(",")]
    for option in named:
        if option in (*known, "null", ""):
            continue
        problem = f"{group}={option} is not known: use one of {', '.join(known)}"
        if not sweep or len(named) == 1 or value.startswith("["):
            raise UserError(problem)
        print(f"error: {problem}", file=sys.stderr, flush=True)
        failed.append(f"{group}={option}")
        value = ",".join(o for o in value.split(",") if o.strip() != option)
    return value
