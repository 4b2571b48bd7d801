"""Passes as text and back: `Checkpoint(memory=0.6),Fuse()`, as `repr` of a pass prints it."""

import ast
import dataclasses
import difflib
import re
from typing import Any, get_type_hints

from graphopt import passes as public
from graphopt.errors import GraphoptError
from graphopt.passes.base import Pass
from graphopt.plan import Plan

# A text in quotes, which stays, or a name with dashes, as the listing of passes has it.
_DASHED = re.compile(r"""('[^']*'|"[^"]*")|\b([a-z]+(?:-[a-z]+)+)\b""")


def program_passes() -> dict[str, type[Pass]]:
    """The public passes that act on programs, by the name of their class.

    >>> list(program_passes())[:2]
    ['Arena', 'Checkpoint']
    """
    kinds = {name: getattr(public, name) for name in public.__all__}
    return {n: k for n, k in kinds.items() if isinstance(k, type) and issubclass(k, Pass)}


def parse_passes(text: str) -> list[Pass]:
    """The passes that `text` lists; GraphoptError names what is wrong, and the nearest names.

    A pass is called by its class or its name, with options that are numbers, texts, lists or None;
    nothing is evaluated. Without options the parentheses may be left out.

    >>> parse_passes('Checkpoint(memory=0.6), stream-loss(returns="lazy"), Fuse')[0].memory
    0.6
    """
    plain = _DASHED.sub(lambda m: m[1] or m[2].replace("-", "_"), text.strip())
    try:
        parsed = ast.parse(f"[{plain}\n]", mode="eval").body
    except (SyntaxError, ValueError):
        parsed = None
    if not plain or not isinstance(parsed, ast.List):
        raise GraphoptError(f"cannot read the passes {text!r}: write Checkpoint(memory=0.6),Fuse()")
    return [_pass(element) for element in parsed.elts]


def pass_syntax(pass_: Pass) -> str:
    """The text from which `parse_passes` makes an equal pass, with options not at their default.

    GraphoptError where an option is an object that no text stands for.
    """
    given = []
    for field in dataclasses.fields(pass_):
        value = getattr(pass_, field.name)
        if field.default is not dataclasses.MISSING and value == field.default:
            continue
        try:
            ast.literal_eval(repr(value))
        except (ValueError, SyntaxError):
            kind = f"{type(pass_).__name__}({field.name}={type(value).__name__})"
            raise GraphoptError(f"{kind} cannot be written as text") from None
        given.append(f"{field.name}={value!r}")
    return f"{type(pass_).__name__}({', '.join(given)})"


def plan_class(kind: type[Pass]) -> type[Plan]:
    """What `kind` plans, by the annotation of its method.

    >>> plan_class(program_passes()["Checkpoint"]).__name__
    'CheckpointPlan'
    """
    found: type[Plan] = get_type_hints(kind.plan)["return"]
    return found


def _pass(element: ast.expr) -> Pass:
    written = ast.unparse(element)
    call = element if isinstance(element, ast.Call) else ast.Call(element, [], [])
    if not isinstance(call.func, ast.Name):
        raise GraphoptError(f"{written} is not a pass: write Checkpoint(memory=0.6)")
    kind = pass_named(call.func.id)
    names = [field.name for field in dataclasses.fields(kind)]
    if len(call.args) > len(names):
        raise GraphoptError(f"{written}: {kind.__name__} has {len(names)} options")
    given = dict(zip(names, call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg is None:
            raise GraphoptError(f"{written}: write each option with its name")
        if keyword.arg not in names:
            near = _near(keyword.arg, names)
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise GraphoptError(f"{kind.__name__} has no option {keyword.arg!r}{near}; {has}")
        if keyword.arg in given:
            raise GraphoptError(f"{written}: {keyword.arg} is given twice")
        given[keyword.arg] = keyword.value
    try:
        return kind(**{name: _literal(name, value) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise GraphoptError(f"{written}: {error}") from None


def pass_named(name: str) -> type[Pass]:
    """The pass on programs with this class or name; GraphoptError for another, with the nearest names.

    >>> pass_named("stream-loss").__name__
    'StreamLoss'
    """
    known = program_passes()
    by_name = {kind.name.replace("-", "_"): kind for kind in known.values()} | known
    wanted = name.replace("-", "_")
    if wanted in by_name:
        return by_name[wanted]
    others = {getattr(public, other).name.replace("-", "_"): other for other in public.__all__}
    if wanted in public.__all__ or wanted in others:
        raise GraphoptError(f"{others.get(wanted, wanted)} changes the module, not its program")
    raise GraphoptError(
        f"no pass is called {name!r}{_near(wanted, [*by_name])}; there are {', '.join(known)}"
    )


def _literal(name: str, value: ast.expr) -> Any:
    try:
        found = ast.literal_eval(value)
    except ValueError:
        text = f"{name}={ast.unparse(value)}"
        raise GraphoptError(f"{text}: an option is a number, a text, a list or None") from None
    return tuple(found) if isinstance(found, list) else found


def _near(name: str, known: list[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = [lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=3)]
    return f" (did you mean {', '.join(near)}?)" if near else ""
