"""Nodes run on real tensors: the time each takes, and what its kernel allocates for itself.

Every distinct node (op, layouts, constants) runs alone on made-up inputs of the recorded sizes. The
allocator's events, as torch's profiler records them in order, give the peak during the op; the
*workspace* is that peak less what remains allocated after it.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.cost_models.calibrate import (
    DEFAULT_CACHE,
    cache_file,
    cpu_model,
    physical_memory_bytes,
    read_json,
    write_json,
)
from graphopt.cost_models.calls import Call, call_of, make
from graphopt.cost_models.values import hint, numel, strides_of
from graphopt.ops import is_elementwise

aten = torch.ops.aten

_SLOW_S = 0.2  # an op that takes longer is not repeated further
_BURST = {"cpu": 1, "cuda": 10}  # runs between two synchronisations
_SHORT_S = 2e-3  # an op is repeated until its runs took this long
_OWN_SHARE = 0.9  # of a run, the least that its thread has to be on the processor for the time to count
_PATIENCE = 4  # an op that other processes disturb is repeated so many times as often
_DISTURBED = "other processes disturbed every run of it"
_MARK = "graphopt.probe "
_LARGE_BYTES = 2**28  # operators with more than that are run only if their scratch is not known
# On a CPU these have no scratch but for blocks of some hundred kilobytes, if they read rows (or columns).
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_BY_ROWS = (
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten.nll_loss_forward.default,
    aten.nll_loss_backward.default,
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What one run of a node showed.

    `seconds` is the least time, that of a first run where no time was asked for, None where the node
    could not be run (`remark` says why); `workspace_bytes` is what was allocated besides the
    `retained_bytes`, which remain: the outputs.
    """

    seconds: float | None
    workspace_bytes: int = 0
    retained_bytes: int = 0
    remark: str = ""


def probe(
    nodes: Iterable[fx.Node],
    *,
    repeats: int = 3,
    cache: Path | None = DEFAULT_CACHE,
    channels_last: bool = False,
) -> dict[str, Probe]:
    """Run each distinct node that can be run alone; the result is by `probe_key`.

    Views, collectives, higher-order ops, custom ops, and ops whose output sizes depend on their
    values are left out; so are large ones whose scratch is known, where time is not asked for
    (`repeats` is 0): planning is not to take more memory than the plan. The random number generators
    are as before afterwards. Results are kept in the folder `cache` per device and version of torch,
    those that were timed apart from the others, but for times that other processes disturbed; None
    keeps nothing. With `channels_last` convolutions run on images of that layout.
    """
    found = (call_of(node, channels_last) for node in nodes if repeats or not _is_large_and_known(node))
    calls = {call.key: call for call in found if call is not None}
    probes: dict[str, Probe] = {}
    for device in dict.fromkeys(call.device for call in calls.values()):
        here = {key: call for key, call in calls.items() if call.device == device}
        timed = None if cache is None else cache_file(cache, "timings", _device_key(device))
        path = timed if repeats or cache is None else cache_file(cache, "probes", _device_key(device))
        kept = {} if path is None or timed is None else {**_read(path), **_read(timed)}
        missing = {key: call for key, call in here.items() if key not in kept}
        fresh = _measure(missing, device, repeats) if missing else {}
        probes |= {key: kept[key] if key in kept else fresh[key] for key in here}
        if path is not None and fresh:
            _write(path, {**_read(path), **fresh})
    return probes


def _is_large_and_known(node: fx.Node) -> bool:
    """True for a large operator on a CPU that allocates its results, and nearly nothing besides."""
    if node.target not in (*_PRODUCTS, *_BY_ROWS) and not is_elementwise(node):
        return False
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
    last = 2 if node.target in _PRODUCTS else 1
    dense = all(t.dim() < 2 or any(hint(s) == 1 for _, s in strides_of(t)[-last:]) for t in tensors)
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    nbytes = sum(numel(t) * t.element_size() for t in tensors)
    return on_cpu and dense and nbytes > _LARGE_BYTES


def probe_key(node: fx.Node, channels_last: bool = False) -> str | None:
    """The key of `node` in the result of `probe`; None for a node that is never probed."""
    call = call_of(node, channels_last)
    return None if call is None else call.key


def workspaces(nodes: Iterable[fx.Node], probes: Mapping[str, Probe]) -> dict[str, int]:
    """The workspace of each node in bytes, by the node's name; nodes without one are left out."""
    found = {node.name: probes.get(probe_key(node) or "") for node in nodes}
    return {name: item.workspace_bytes for name, item in found.items() if item and item.workspace_bytes}


def _measure(calls: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, Probe]:
    """Time every call, then run each once more under one profiler session for its memory."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(calls, Probe(None, remark=f"there is no device {device} here"))
    probes: dict[str, Probe] = {}
    with undisturbed(device):
        for key, call in calls.items():
            seconds, remark = _time(call, device, repeats)
            probes[key] = Probe(seconds, remark=remark)
        timed = [key for key, item in probes.items() if item.seconds is not None]
        peaks = _profile([calls[key] for key in timed], device)
        for key, memory in zip(timed, peaks, strict=True):
            seconds, remark = probes[key].seconds, probes[key].remark
            if memory is None:
                probes[key] = Probe(seconds, remark="the profiler recorded nothing")
            else:
                peak, retained = memory
                probes[key] = Probe(seconds, peak - max(retained, 0), max(retained, 0), remark)
    return probes


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Real tensors, no autograd, no autocast, and the random number generators put back."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        yield


def _time(call: Call, device: torch.device, repeats: int) -> tuple[float | None, str]:
    """The least seconds of `repeats` runs after a first one; or None and why it cannot run."""
    size_bytes = sum(spec.elements * spec.dtype.itemsize for spec in call.specs)
    if size_bytes > limit_bytes(device):
        return None, f"its inputs of {size_bytes} bytes are too large to be made up here"
    try:
        args, kwargs = pytree.tree_map(make, (call.args, call.kwargs))
        first, _ = _run(call, args, kwargs, device, 1)  # may load or compile what it needs
        if not repeats:
            return first, ""
        runs, alone = [first], [False]
        while len(runs) <= repeats or sum(runs) < _SHORT_S or not any(alone):
            seconds, own = _run(call, args, kwargs, device, _BURST[device.type])
            runs.append(seconds)
            alone.append(own)
            if seconds > _SLOW_S or (len(runs) > _PATIENCE * repeats and sum(runs) > _SHORT_S):
                break
    except Exception as error:  # whatever a kernel raises on made-up values
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    own_runs = [seconds for seconds, own in zip(runs, alone, strict=True) if own]
    return min(own_runs or runs), "" if own_runs else _DISTURBED


def _run(call: Call, args: Any, kwargs: Any, device: torch.device, count: int) -> tuple[float, bool]:
    """Seconds per run of `count` runs, one output alive at a time, and whether nothing else ran here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    busy = time.thread_time()
    start = time.perf_counter()
    for _ in range(count):
        result = call.op(*args, **kwargs)
        if count > 1:
            del result
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    own = device.type == "cuda" or time.thread_time() - busy >= _OWN_SHARE * took
    return took / count, own


def _profile(calls: list[Call], device: torch.device) -> list[tuple[int, int] | None]:
    """Peak and remaining bytes of each call above what was allocated before it."""
    found: list[tuple[int, int] | None] = [None] * len(calls)
    if torch._C._autograd._profiler_enabled():  # a second session would end the caller's
        return found
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
            ran = [_ran_marked(call, f"{_MARK}{index}") for index, call in enumerate(calls)]
        roots = session.profiler.kineto_results.experimental_event_tree()
    except RuntimeError:  # the profiler does not work in this build of torch
        return found
    for event in roots:
        if event.name.startswith(_MARK):
            index = int(event.name.removeprefix(_MARK))
            found[index] = _peak_and_rest(event, device) if ran[index] else None
    return found


def _ran_marked(call: Call, mark: str) -> bool:
    """Run `call` within an event called `mark`, which its outputs outlive; False if it fails."""
    try:
        args, kwargs = pytree.tree_map(make, (call.args, call.kwargs))
        with record_function(mark):
            result = call.op(*args, **kwargs)
        del result
    except RuntimeError:  # there is no memory for it any more
        return False
    return True


def _peak_and_rest(root: Any, device: torch.device) -> tuple[int, int]:
    """Largest and last sum of the allocations below an event of the profiler's tree, in order."""
    events = sorted(_allocations(root, device), key=lambda event: event.start_time_ns)
    peak = live = 0
    for event in events:
        live += event.extra_fields.alloc_size
        peak = max(peak, live)
    return peak, live


def _allocations(event: Any, device: torch.device) -> Iterator[Any]:
    fields = event.extra_fields
    if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
        if fields.device.type == device.type:
            yield event
        return
    for child in event.children:
        yield from _allocations(child, device)


def limit_bytes(device: torch.device) -> int:
    """The most that inputs may take: a quarter of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return physical_memory_bytes() // 4


def _device_key(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_model()}, {torch.get_num_threads()} threads"
    return f"{device.type} {name}, torch {torch.__version__}"


def _read(path: Path) -> Mapping[str, Probe]:
    """The probes that are kept in a file, which is parsed anew only where it was written since."""
    try:
        state = path.stat()
    except OSError:
        return {}
    return _parsed(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _parsed(path: Path, _written_ns: int, _nbytes: int) -> Mapping[str, Probe]:
    return {key: Probe(*values) for key, values in (read_json(path) or {}).items()}


def _write(path: Path, probes: Mapping[str, Probe]) -> None:
    known = {key: item for key, item in probes.items() if not item.remark}
    write_json(
        path,
        {key: (item.seconds, item.workspace_bytes, item.retained_bytes) for key, item in known.items()},
    )
