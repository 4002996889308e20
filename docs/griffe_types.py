"""Types in docstrings as griffe reads them: `(str, optional)` for transformers' "(`str`, *optional*)"."""

import re

import griffe


class PlainTypes(griffe.Extension):
    """Changes the docstrings before they are parsed."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            # The type of an argument, and that of a returned value at the start of a line.
            pattern = re.compile(r"(?m)^( +(?:\w+, )*\w+ )\(([^()\n]*`[^()\n]*)\):|^( +)`([^`\n]+)`: ")
            obj.docstring.value = pattern.sub(_plain, obj.docstring.value)


def _plain(match):
    if match[4]:
        return f"{match[3]}{match[4]}: "
    types, *rest = re.sub(r"[`*]", "", match[2]).split(", ")
    optional = ", optional" if any("optional" in part or "defaults" in part for part in rest) else ""
    return f"{match[1]}({types}{optional}):"
