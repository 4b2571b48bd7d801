"""An extension of griffe: examples in docstrings become blocks of code of their own."""

import re
from typing import Any

import griffe

# A line that begins an example, and all behind it up to an empty line.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.*\S.*)*", re.MULTILINE)


def with_blocks(docstring: str) -> str:
    """`docstring` as Markdown that shows its examples as code.

    >>> with_blocks(">>> 1 + 1\\n2")
    '```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found.group()}\n```", docstring)


class DoctestBlocks(griffe.Extension):
    """Fences the examples of every docstring that is shown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of `obj` before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = with_blocks(obj.docstring.value)
