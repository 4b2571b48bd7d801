"""Where in the model a node of a graph comes from, and what it runs."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')
_KEY = re.compile(r"\['([^']*)'\]|\.([A-Za-z_]\w*)|\.(\d+)|\[(\d+)\]|, '([^']*)'\)")
_TORCH = str(Path(torch.__file__).parent) + os.sep


@dataclass(frozen=True)
class Origin:
    """Where in the model a node comes from: `file:line`, the code there, the submodule's path."""

    place: str
    code: str
    module: str


def operator_name(node: fx.Node) -> str:
    """What the node runs, as in `torch.ops`: `aten.mm`."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def origin_of(node: fx.Node) -> Origin:
    """The line of the model that made `node`: the innermost one outside of torch.

    The module of a node of the backward is that of the forward node which it differentiates.
    """
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    mine = [f for f in frames if not f["file"].startswith(_TORCH)] or frames
    stacks = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    stack = list(stacks.values())
    module = _module_path(stack[-1][0]) if stack else ""
    if not mine:
        return Origin("", "", module)
    place = f"{short_path(mine[-1]['file'])}:{mine[-1]['line']}"
    return Origin(place, mine[-1]["code"].strip(), module)


def _module_path(source: str) -> str:
    """The submodule's path from what tracing calls it, a name in its own code.

    >>> _module_path("L['self']._modules['h']._modules['0'].mlp")
    'h.0.mlp'
    >>> _module_path("getattr(L['fn'].__self__._modules['0'], 'a b')")  # of a bound method's module
    '0.a b'
    """
    keys = [next(part for part in match if part) for match in _KEY.findall(source) if any(match)]
    if "__self__" in keys:
        keys = keys[keys.index("__self__") + 1 :]
    elif source.startswith(("L[", "G[", "getattr(L[", "getattr(G[")):
        keys = keys[1:]  # a local or a global variable, which is the model itself
    return ".".join(key for key in keys if key != "_modules")


def short_path(file: str) -> str:
    """The path below the folder of installed packages, else below the current folder; "cell" for one."""
    for folder in ("site-packages/", "dist-packages/"):
        if folder in file:
            return file.rpartition(folder)[2]
    if "/ipykernel_" in file:  # a cell of a notebook, under a name that says nothing
        return "cell"
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def format_seconds(seconds: float) -> str:
    """`seconds` with three digits.

    >>> format_seconds(0.00031), format_seconds(1.5), format_seconds(2e-7), format_seconds(0)
    ('310 us', '1.50 s', '0.200 us', '0 s')
    """
    if not seconds:
        return "0 s"
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
    scale, unit = next(((s, u) for s, u in units if seconds >= 0.9995 * s), units[-1])
    amount = seconds / scale
    digits = 0 if amount >= 99.95 else 1 if amount >= 9.995 else 2 if amount >= 0.9995 else 3
    return f"{amount:.{digits}f} {unit}"
