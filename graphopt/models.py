"""A model from one line of text: a zoo name, ``file.py:factory`` or an exported ``.pt2`` file.

>>> from graphopt.models import load_model
>>> loaded = load_model("gpt2", batch=1, seq=8)
>>> output = loaded.model(*loaded.example_args, **loaded.example_kwargs)
>>> loaded.loss_of(output).shape
torch.Size([])
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from graphopt import zoo
from graphopt.errors import GraphoptError


def loss_of(output: Any) -> Tensor:
    """The scalar loss in what a model returned.

    That is the output itself where it is a tensor, else its ``loss`` (an attribute or a key), else
    the first item of a tuple or list.

    >>> loss_of({"logits": torch.zeros(4), "loss": torch.tensor(1.5)})
    tensor(1.5000)
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor) and found.ndim == 0:
        return found
    raise GraphoptError(
        f"there is no scalar loss in the model's output, {_described(output)}: return a scalar "
        "tensor, an output with a `loss`, or a tuple whose first item is the loss"
    )


@dataclass(frozen=True)
class LoadedModel:
    """A model and the inputs to run it with: ``model(*example_args, **example_kwargs)``.

    Both are empty where a file gives a model without inputs.
    """

    name: str
    model: nn.Module
    example_args: tuple[Any, ...] = ()
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss_of: Callable[[Any], Tensor] = loss_of


def load_model(
    spec: str,
    *,
    size: zoo.Size | None = None,
    overrides: Mapping[str, zoo.Value] | None = None,
    batch: int | None = None,
    seq: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> LoadedModel:
    """The model that ``spec`` names, with example inputs.

    - A zoo name, such as ``gpt2``: small, on the CPU, in float32, with 2 samples of 32 tokens,
      unless the options say otherwise.
    - ``file.py:factory``: the function gets ``overrides`` as keyword arguments and returns a
      module, or a pair of a module and its inputs: a tensor, a tuple of positional inputs, or a
      dict of inputs by name. The file is run, so it must be one you trust.
    - ``file.pt2``: a program saved with `torch.export.save`, with the inputs it was exported with.

    The options that a file has decided itself are refused, never ignored.
    """
    path, _, factory = spec.rpartition(":") if ":" in spec else (spec, "", "")
    sizes = {key: value for key, value in (("batch", batch), ("seq", seq)) if value is not None}
    if Path(path).suffix not in (".py", ".pt2"):
        place, kind = device or "cpu", dtype or torch.float32
        model = zoo.build(spec, size or "small", overrides, device=place, dtype=kind, seed=seed)
        inputs = zoo.example_batch(spec, model, **sizes, seed=seed)
        return LoadedModel(spec, model, example_kwargs=inputs)
    _refuse(spec, size=size, dtype=dtype, **sizes)
    if spec.endswith(".pt2"):
        _refuse(spec, overrides=overrides or None)
        return _from_export(spec, device)
    if not factory:
        raise GraphoptError(f"{spec} names a file but no function in it: write {path}:factory")
    return _from_factory(spec, _existing(path), factory, overrides or {}, device, seed)


def _refuse(spec: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None:
            raise GraphoptError(f"{option}={value} has no effect on {spec}: the file decides it")


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise GraphoptError(f"there is no file {path}")
    return file


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


# --- exported programs -------------------------------------------------------------------------


def _from_export(spec: str, device: str | torch.device | None) -> LoadedModel:
    file = _existing(spec)
    try:
        _import_outputs(file)
        program = torch.export.load(file)
        if device is not None:
            program = move_to_device_pass(program, device)
        model = program.module()
    except Exception as error:
        raise GraphoptError(
            f"cannot load {spec} as a program saved with torch.export.save: {error}"
        ) from error
    args, kwargs = program.example_inputs or ((), {})
    return LoadedModel(file.name, model, tuple(args), dict(kwargs))


def _import_outputs(file: Path) -> None:
    """Import the modules of transformers that the file mentions.

    A program that returns one of their output classes is only read once the class is registered.
    """
    with zipfile.ZipFile(file) as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    pattern = rb"transformers\.[a-z0-9_.]*modeling_[a-z0-9_]+"
    for name in sorted({match for text in texts for match in re.findall(pattern, text)}):
        with contextlib.suppress(ImportError):
            importlib.import_module(name.decode())


# --- Python files ------------------------------------------------------------------------------


def _from_factory(
    spec: str,
    file: Path,
    name: str,
    arguments: Mapping[str, zoo.Value],
    device: str | torch.device | None,
    seed: int,
) -> LoadedModel:
    place = torch.device(device or "cpu")
    with zoo.seeded(seed, place), place if device else contextlib.nullcontext():
        try:
            module = _imported(file)
        except Exception as error:
            raise GraphoptError(f"running {file} failed: {_reason(error)}") from error
        factory = getattr(module, name, None)
        if not callable(factory):
            raise GraphoptError(f"{file} has no function {name!r}{_functions(module, name)}")
        try:
            result = factory(**arguments)
        except Exception as error:
            raise GraphoptError(f"{spec} failed: {_reason(error)}") from error
    model, inputs = _pair(spec, result)
    args, kwargs = _arguments(spec, inputs)
    if device:
        model = model.to(place)
        args, kwargs = pytree.tree_map_only(Tensor, lambda value: value.to(place), (args, kwargs))
    return LoadedModel(f"{file.name}:{name}", model, args, kwargs)


def _imported(file: Path) -> ModuleType:
    """The file run as a module, which finds the files beside it as a script would."""
    path = file.resolve()
    name = f"graphopt_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # It stays registered, since torch.compile looks modules up by name; a second load replaces it.
    sys.modules[name] = module
    with _first_on_path(path.parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _functions(module: ModuleType, name: str) -> str:
    found = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    near = difflib.get_close_matches(name, found, n=4) or found
    return f"; it has {', '.join(near)}" if near else ""


def _pair(spec: str, result: Any) -> tuple[nn.Module, Any]:
    if isinstance(result, nn.Module):
        return result, ()
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
        return result
    what = _described(result)
    if isinstance(result, tuple):
        what = f"a tuple of {', '.join(_described(item) for item in result) or 'nothing'}"
    raise GraphoptError(f"{spec} returned {what}, not a torch.nn.Module or (module, inputs)")


def _arguments(spec: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        return (), dict(inputs)
    raise GraphoptError(
        f"{spec} returned {_described(inputs)} as the example inputs, not a tensor, a tuple or "
        "a dict by argument name"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
