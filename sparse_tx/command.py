"""What the three scripts share: compose by Hydra, run, and turn a user's mistake into one message and exit code 1."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from sparse_tx.config import config_folder
from sparse_tx.errors import UserError
from sparse_tx.training.folders import override


def main(function: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run `function` on the config that the command line composes; in a sweep, on each of its members.

    A member of a sweep that fails is reported and the others go on; the exit code is 1 if any failed.
    """
    failed: list[str] = []

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
    def job(cfg: DictConfig) -> None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        name = " ".join(HydraConfig.get().overrides.task)
        try:
            if sweep:
                print(f"run {HydraConfig.get().job.num}: {name}", flush=True)
                _refuse_several_devices(cfg)
            function(cfg)
        except UserError as error:
            failed.append(name)
            print(f"error: {error}", file=sys.stderr, flush=True)
        except Exception:
            if not sweep:
                raise
            failed.append(name)
            traceback.print_exc()

    try:
        _check_arguments(sys.argv[1:])
        job()
    except UserError as error:
        sys.exit(f"error: {error}")
    if failed:
        if len(failed) > 1 or failed[0] != " ".join(a for a in sys.argv[1:] if not a.startswith("-")):
            print("failed: " + "; ".join(failed), file=sys.stderr)
        sys.exit(1)


def _check_arguments(arguments: list[str]) -> None:
    """An override that Hydra cannot parse and quotes would mend: say how, before Hydra's own message."""
    parser = OverridesParser.create()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            continue
        try:
            parser.parse_override(argument)
        except HydraException:
            quoted = override(key, value)
            raise UserError(
                f"{argument} cannot be parsed: quote the value, for Hydra and the shell: {quoted}"
            ) from None


def _refuse_several_devices(cfg: DictConfig) -> None:
    devices = str(cfg.get("trainer", {}).get("devices", 1))
    if devices not in ("1", "auto") or cfg.get("trainer", {}).get("strategy") == "ddp":
        raise UserError(
            f"a sweep (-m) with trainer.devices={devices} would start itself once more on each device: start one "
            "command a member, without -m, or keep trainer.devices=1"
        )
