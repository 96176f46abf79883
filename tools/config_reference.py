"""Writes docs/config.md: every key of every command, from the schema and the comments of the YAML files.

python tools/config_reference.py
"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from sparse_tx.command import SCHEMAS
from sparse_tx.config import config_folder
from sparse_tx.merge import flat_fields

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
INTRO = """# Every key

<!-- Written by tools/config_reference.py from the schema and the YAML files. -->

A key is set by `key=value` on the command line, an option of a group by `group=option`; keys of a group follow the
group's name and a dot. A key that does not exist is refused with the nearest that does, a value that cannot work with
what would. Lists are written `[a,b]`, and a value with other signs than letters, digits and `. _ - /` in double quotes
inside single ones: `'checkpoint="runs/epoch=1.ckpt"'`.
"""
COMMANDS = {
    "train": "python train.py",
    "evaluate": "python evaluate.py",
    "sample": "python sample.py",
    "export": "python -m sparse_tx.export",
}
KEY_TABLE = ["key", "type", "value", "meaning"]
LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: +(?P<value>.*?))??(?:\s+# (?P<comment>.*))?$")


def entries(path: Path) -> dict[str, tuple[str, str]]:
    """Dotted key -> (value as written, comment) of a YAML file, without its defaults list and Hydra's own keys."""
    found: dict[str, tuple[str, str]] = {}
    parents: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        key = ".".join([*(name for _, name in parents), match["key"]])
        parents.append((indent, match["key"]))
        if key.partition(".")[0] not in ("defaults", "hydra"):
            found[key] = (match["value"] or "", match["comment"] or "")
    return {k: v for k, v in found.items() if not any(other.startswith(f"{k}.") for other in found)}


def introduction(path: Path) -> str:
    """The comment that a file opens with, without Hydra's own line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("# "))
    return " ".join(lines)


def type_name(kind: Any) -> str:
    """Of `int`, `list[str]`, `float | None`."""
    (inner,) = [k for k in get_args(kind) if k is not NoneType] if NoneType in get_args(kind) else [kind]
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", list[str]: "list"}
    return names[inner]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(cell, line)) + " |" for line in lines] + [""]


def key_rows(written: dict[str, tuple[str, str]], types: dict[str, Any], prefix: str) -> list[list[str]]:
    rows = []
    for key, (value, comment) in written.items():
        full = prefix + key
        if not comment:
            raise SystemExit(f"{full} has no comment in its YAML file: say what it means")
        kind = "" if value.startswith("{") else type_name(types[full])
        rows.append([f"`{full}`", kind, "required" if value == "???" else f"`{value}`", comment])
    return rows


def group_section(group: str, options: list[str], default: str, types: dict[str, Any]) -> list[str]:
    files = {option: entries(config_folder() / group / f"{option}.yaml") for option in options}
    chosen = {k: v for k, v in files[default].items() if k != "name"}
    for key, (value, _) in chosen.items():
        by_comment: dict[str, list[str]] = {}
        for option, written in files.items():
            if key in written and written[key][1]:
                by_comment.setdefault(written[key][1], []).append(option)
        if len(by_comment) > 1:
            said = "; ".join(f"{', '.join(named)}: {comment}" for comment, named in by_comment.items())
            chosen[key] = (value, said)
    keys = table(KEY_TABLE, key_rows(chosen, types, f"{group}."))
    if len(options) == 1:
        return [f"### {group}", "", *keys]
    # An option that leaves keys to the default's file is told by what it is alone.
    shared = [k for k in chosen if all(k in f for f in files.values())]
    differing = [k for k in shared if len({f[k][0] for f in files.values()}) > 1 and "{" not in chosen[k][0]]
    rows = [
        [f"`{o}`", *(f"`{f[k][0]}`" for k in differing), introduction(config_folder() / group / f"{o}.yaml")]
        for o, f in files.items()
    ]
    lines = [f"### {group}", "", *table([f"`{group}=`", *(f"`{k}`" for k in differing), "what it is"], rows)]
    return [*lines, f"Keys, with the values of `{group}={default}`:", "", *keys]


def logger_section(types: dict[str, Any]) -> list[str]:
    rows, keys = [], []
    for path in sorted((config_folder() / "logger").glob("*.yaml")):
        rows.append([f"`{path.stem}`", introduction(path)])
        keys += key_rows({k: v for k, v in entries(path).items() if "." in k}, types, "logger.")
    lines = ["### logger", "", "One, or a list of several.", "", *table(["`logger=`", "what it is"], rows)]
    return lines + table(KEY_TABLE, keys)


def experiment_section() -> list[str]:
    rows = []
    for path in sorted((config_folder() / "experiment").glob("*.yaml")):
        expected = re.search(r"# Expected: (.*?)\n# Hardware: ", path.read_text(), re.DOTALL)
        assert expected is not None
        rows.append([f"`{path.stem}`", expected[1].replace("\n# ", " ")])
    text = "An experiment chooses options of the groups and sets some of their keys; each file opens with its command,"
    lines = [
        "### `experiment=` null or one of these",
        "",
        text,
        "the result to expect, the hardware and the sources.",
        "",
    ]
    return lines + table(["`experiment=`", "expected"], rows)


def overlay_section(group: str) -> list[str]:
    """A group whose options change keys of other groups."""
    rows = [[f"`{p.stem}`", introduction(p)] for p in sorted((config_folder() / group).glob("*.yaml"))]
    return [f"### {group}", "", *table([f"`{group}=`", "what it is"], rows)]


def train_section(types: dict[str, Any]) -> list[str]:
    defaults = yaml.safe_load((config_folder() / "train.yaml").read_text())["defaults"]
    chosen = {k: v for entry in defaults if isinstance(entry, dict) for k, v in entry.items() if "/" not in k}
    lines = []
    for group, default in chosen.items():
        options = sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))
        if group == "logger":
            lines += logger_section(types)
        elif group == "experiment":
            lines += experiment_section()
        elif default is None:
            lines += overlay_section(group)
        else:
            lines += group_section(group, options, default, types)
    return lines


def page() -> str:
    lines = [INTRO]
    for command, spelled in COMMANDS.items():
        types = {key: kind for key, kind, _ in flat_fields(SCHEMAS[command])}
        lines += [f"## {command}", "", f"`{spelled}`, or `sparse-tx {command}` where the package is installed.", ""]
        lines += table(KEY_TABLE, key_rows(entries(config_folder() / f"{command}.yaml"), types, ""))
        if command == "train":
            lines += train_section(types)
        elif command == "evaluate":
            lines += ["`debug=fast` makes this and the next two a matter of seconds, on a synthetic twin.", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote: {PAGE}")
