"""docs/settings.md, made from the settings themselves:

python -m loraplex.config.reference > docs/settings.md
"""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from loraplex.config.settings import Settings


def settings_markdown() -> str:
    """A table for each section of the file: name, default, meaning."""
    lines = [
        "# Settings",
        "",
        "One TOML file, given to `loraplex serve --config FILE`. `loraplex check-config FILE` prints every setting as",
        "it takes effect; an unknown key is an error. Made by `python -m loraplex.config.reference`.",
    ]
    for section, kind in get_type_hints(Settings).items():
        lines += ["", f"## [{section}]", "", "| setting | default | meaning |", "|---|---|---|"]
        hints = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            lines.append(f"| `{field.name}` | {_default(field)} | {_help(hints[field.name])} |")
    return "\n".join(lines) + "\n"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    if field.default is None:
        return "unset"
    return f"`{msgspec.json.encode(field.default).decode()}`"


def _help(hint: Any) -> str:
    """The description in an annotation."""
    if get_origin(hint) is Annotated:
        for part in get_args(hint)[1:]:
            if isinstance(part, msgspec.Meta) and part.description:
                return part.description
    raise TypeError(f"{hint} has no help text")


if __name__ == "__main__":
    print(settings_markdown(), end="")
