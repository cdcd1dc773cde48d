"""What the documents state is what the code does: keys, columns, numbers on the wire, captions."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())


def table_rows(text: str) -> list[list[str]]:
    """The cells of every body row of every Markdown table in `text`."""
    rows, in_body = [], False
    for line in text.splitlines():
        if re.fullmatch(r"\|( *:?-+:? *\|)+", line):
            in_body = True
        elif not line.startswith("|"):
            in_body = False
        elif in_body:
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or a higher one."""
    level = heading.index(" ")
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    end = re.search(rf"^#{{1,{level}}} ", text[start:], re.MULTILINE)
    return text[start : start + end.start()] if end else text[start:]


def schema_keys(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every key below a schema node by its dotted path, with the cells that its row in config/README.md must have."""
    for name, below in node.get("properties", {}).items():
        here, child = f"{path}{name}", resolved(below)
        yield here, [type_cell(child), default_cell(child, name in node.get("required", [])), allowed_cell(child)]
        yield from schema_keys(child, f"{here}.")
        if isinstance(child.get("additionalProperties"), dict):
            yield from schema_keys(resolved(child["additionalProperties"]), f"{here}.NAME.")


def resolved(node: Mapping[str, Any]) -> dict[str, Any]:
    """A schema node with its $ref followed; what stands beside the $ref wins."""
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] | node if "$ref" in node else dict(node)


def type_cell(node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return "text"
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    name = " or ".join({"string": "text", "array": "list", "object": "mapping"}.get(each, each) for each in types)
    return name.replace("list", f"list of {type_cell(node['items'])}") if "items" in node else name


def default_cell(node: Mapping[str, Any], required: bool) -> str:
    if "default" in node:
        return f"`{json.dumps(node['default'])}`"
    return "required" if required else ""


def allowed_cell(node: Mapping[str, Any]) -> str:
    values = node.get("enum", node.get("items", {}).get("enum", []))
    low, high, above = (node.get("items", {}).get(key, node.get(key)) for key in ("minimum", "maximum", "exclusiveMinimum"))
    parts = [", ".join(f"`{value}`" for value in values)]
    parts.append(f"{low} to {high}" if high is not None else f"{low} or more" if low is not None else "")
    parts.append(f"above {above}" if above is not None else "")
    parts.append(f"`{node['pattern']}`" if "pattern" in node else "")
    parts.append("not empty" if node.get("minItems") or node.get("minLength") else "")
    parts.append("none twice" if node.get("uniqueItems") else "")
    return "; ".join(filter(None, parts))
