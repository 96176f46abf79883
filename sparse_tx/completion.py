"""`sparse-tx completion bash|zsh`: a script with every command, group, option and key written out.

Nothing of Python runs at a press of the key: importing torch for each would take seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import yaml

from sparse_tx.command import SCHEMAS
from sparse_tx.config import config_folder
from sparse_tx.merge import flat_fields

SHELLS = ("bash", "zsh")
PATHS = ("checkpoint", "resume", "prompt", "to", "output", "data.source", "data.root")  # keys that name files

# COMP_WORDS is not used: bash cuts it at "=", zsh does not. What follows "=" is offered alone where bash cut.
_BASH = """# bash completion for sparse-tx: eval "$(sparse-tx completion bash)"
_sparse_tx() {
    local line=${COMP_LINE:0:COMP_POINT}
    local word=${line##* } command
    read -r _ command _ <<< "$line"
    COMPREPLY=()
    if [[ "$line" != *" $command "* ]]; then
        COMPREPLY=($(compgen -W "@commands@" -- "$word"))
        compopt +o nospace 2> /dev/null
        return
    fi
    local keys="" key=${word%%=*} values=""
    case $command in
@keys@
        completion) COMPREPLY=($(compgen -W "@shells@" -- "$word")); return ;;
        *) return ;;
    esac
    if [[ $word != *=* ]]; then
        COMPREPLY=($(compgen -W "$keys" -- "$word"))
        return
    fi
    local value=${word#*=} prefix="$key="
    [[ ${COMP_WORDBREAKS-} == *=* ]] && prefix=""
    case $command:$key in
@values@
        @paths@) COMPREPLY=($(compgen -P "$prefix" -f -- "$value")); return ;;
    esac
    COMPREPLY=($(compgen -P "$prefix" -W "$values" -- "$value"))
}
complete -o nospace -F _sparse_tx sparse-tx
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def completion(arguments: list[str]) -> int:
    """Prints the script for the shell that arguments name. Returns the exit code."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        print(f"error: completion takes the name of a shell: {' or '.join(SHELLS)}", file=sys.stderr)
        return 2
    print((_ZSH if arguments[0] == "zsh" else "") + script(), end="")
    return 0


def script() -> str:
    from sparse_tx.cli import COMPOSED, PLAIN

    keys, values = [], []
    for command in COMPOSED:
        groups = _groups(command)
        words = [f"{name}=" for name in (*groups, *_plain_keys(command, groups))]
        keys.append(f'        {command}) keys="{" ".join(sorted(set(words)))}" ;;')
        values += [f'        {command}:{name}) values="{" ".join(options)}" ;;' for name, options in groups.items()]
        values += [f'        {command}:{key}) values="true false" ;;' for key in _switches(command)]
    paths = "|".join(f"*:{key}" for key in PATHS)
    filled = {
        "@commands@": " ".join(COMPOSED | PLAIN),
        "@keys@": "\n".join(keys),
        "@values@": "\n".join(values),
        "@shells@": " ".join(SHELLS),
        "@paths@": paths,
    }
    text = _BASH
    for name, part in filled.items():
        text = text.replace(name, part)
    return text


def _groups(command: str) -> dict[str, list[str]]:
    """Groups of the command's config and their options: folders that its defaults list names."""
    defaults = yaml.safe_load((config_folder() / f"{command}.yaml").read_text())["defaults"]
    named = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    folders = [folder for name in named if (folder := config_folder() / Path(name)).is_dir()]
    return {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in folders}


def _plain_keys(command: str, groups: dict[str, list[str]]) -> list[str]:
    known = [key for key, _, _ in flat_fields(SCHEMAS[command])]
    parents = {key.rpartition(".")[0] for key in known}
    return [key for key in known if key not in parents and key not in groups]


def _switches(command: str) -> list[str]:
    return [key for key, kind, _ in flat_fields(SCHEMAS[command]) if bool in (kind, *get_args(kind))]
