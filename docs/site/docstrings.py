"""For `make docs`: arguments and fields that a docstring tells of as lines ``name: what it is`` become a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

NAMED = re.compile(r"(\w+(?:, \w+)*): ")


class Named(Extension):
    """Runs over each docstring before it is made into a page."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of `obj`, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """`text` with a bullet before each line that starts with names and a colon, in paragraphs that start so."""
    return "\n\n".join(map(_listed, text.split("\n\n")))


def _listed(paragraph: str) -> str:
    if not NAMED.match(paragraph):
        return paragraph
    return "\n".join(
        NAMED.sub(r"- **\1**: ", line, count=1) if NAMED.match(line) else line for line in paragraph.split("\n")
    )
