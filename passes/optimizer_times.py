"""What updates on the device and on the host take, and transfers between both, as measured."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt.cost_models.contention import Repetition, contention
from graphopt.cost_models.link_costs import Line
from graphopt.cost_models.optimizer_tasks import HOST, UpdateCosts
from graphopt.cost_models.task_graph import DEVICE_TO_HOST, HOST_TO_DEVICE
from graphopt.passes.host_memory import Host, Transfer
from graphopt.passes.optimizer_rules import Group, Rule, in_chunks
from graphopt.passes.transfer_thread import line_of

_PROBE_S = 0.02  # of a throttled transfer that is timed
_LEAST = 2**16  # bytes or elements
_PAIRS = 7  # runs side by side, of which the median counts
_CACHE_BYTES = 2**27  # more than caches of processors hold

Start = Callable[[], Callable[[], object]]  # begins something, and gives what waits for it


def measured_costs(
    rule: Rule,
    group: Group,
    parameters: Sequence[Tensor],
    host: Host,
    elements: int,
    scratch_bytes: int,
) -> UpdateCosts:
    """Of subgroups of up to `elements` with the dtype and device of the first of `parameters`.

    What a processor's cache holds of a subgroup is gone when its turn comes again: updates are timed
    after all parameters were read.
    """
    probe = _Probe(rule, group, parameters, host, elements, scratch_bytes)
    try:
        device, move, work = probe.times(probe.update), probe.times(probe.move), probe.host_time()
        fetch, put = probe.transfers(probe.memory.fetch), probe.transfers(probe.memory.put)
        seconds = work.seconds(probe.host_elements)
        found = {HOST: probe.contention(seconds, probe.host_work)}
        for channel, line, transfer in (
            (HOST_TO_DEVICE, fetch, probe.memory.fetch),
            (DEVICE_TO_HOST, put, probe.memory.put),
        ):
            start = probe.moving(transfer, probe.most_bytes)
            found[channel] = probe.contention(line.seconds(probe.most_bytes), start)
    finally:
        probe.close()
    return UpdateCosts(device, work, move, fetch, put, found)


class _Probe:
    """A subgroup on either side, of numbers such as gradients and their moments could be."""

    def __init__(
        self,
        rule: Rule,
        group: Group,
        parameters: Sequence[Tensor],
        host: Host,
        elements: int,
        scratch_bytes: int,
    ) -> None:
        like = parameters[0]
        self.rule, self.group, self.elements, self.device = rule, group, elements, like.device
        self.others = parameters
        tensors = 2 + len(rule.states(group))
        nbytes = tensors * elements * like.element_size()
        self.memory, self.worker = host.memory(nbytes, like.device), host.worker()
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        self.here, self.there = (
            m.view(like.dtype).view(tensors, -1) for m in (self.bytes, self.memory.bytes)
        )
        for memory in (self.here, self.there):
            memory.uniform_(0.1, 1.0)
        self.scratch = [
            torch.empty(scratch_bytes, dtype=torch.uint8, device=m.device)
            for m in (self.here, self.there)
        ]
        # A throttle lets through at once what would take a few ms: its rate is taken as it is.
        self.least_s = [1 / rate if rate else 0.0 for rate in (host.bytes_per_s, host.elements_per_s)]
        self.most_bytes, self.host_elements = (
            int(min(most, max(_LEAST, _PROBE_S / least))) if least else most
            for most, least in zip((nbytes, elements), self.least_s, strict=True)
        )

    def update(self, elements: int) -> None:
        """One update of so many elements on the device; not waited for on CUDA."""
        value, gradient, *states = (t[:elements] for t in self.here)
        with torch.no_grad():
            for (some, slope, *held), scratch in in_chunks(self.scratch[0], [value, gradient, *states]):
                self.rule.update(self.group, 2, some, slope, held, scratch)

    def direct(self, elements: int) -> None:
        """What the host does for one update."""
        value, gradient, *states = (t[:elements] for t in self.there)
        with torch.no_grad():
            for (some, slope, *held), scratch in in_chunks(self.scratch[1], [value, gradient, *states]):
                self.rule.direct(self.group, 2, some, slope, held, scratch)
            gradient.fill_(0.1)  # as a new one would be

    def move(self, elements: int) -> None:
        """What the device does behind that."""
        with torch.no_grad():
            self.rule.move(self.group, self.here[0, :elements], self.here[1, :elements])

    def finish(self) -> None:
        """Until the device has computed all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, run: Callable[[int], None]) -> Line:
        """The time of what is computed, by elements."""

        def move(elements: int) -> None:
            run(elements)
            self.finish()

        return line_of(move, sorted({max(1, self.elements // 4), self.elements}), self.forget)

    def forget(self) -> None:
        """Read what is larger than the processor's cache, where there is that much."""
        left = _CACHE_BYTES if self.device.type == "cpu" else 0
        for other in self.others:
            if left <= 0:
                return
            other.detach().sum()
            left -= other.numel() * other.element_size()

    def host_time(self) -> Line:
        """The time of what the host does, by elements."""
        line = self.times(self.direct)
        return Line(line.alpha_s, max(line.beta_s, self.least_s[1]))

    def transfers(self, move: Callable[..., Transfer]) -> Line:
        """The time of transfers, by bytes."""
        sizes = sorted({max(1, self.most_bytes // 4), self.most_bytes})
        line = line_of(lambda nbytes: self.moving(move, nbytes)()(), sizes)
        return Line(line.alpha_s, max(line.beta_s, self.least_s[0]))

    def moving(self, move: Callable[..., Transfer], nbytes: int) -> Start:
        """A transfer of so many bytes."""
        return lambda: move([(self.bytes[:nbytes], 0)]).synchronize

    def host_work(self) -> Callable[[], object]:
        """An update on the host, beside what the device does."""

        def run() -> None:
            self.worker.throttle.begin(time.perf_counter())
            self.direct(self.host_elements)
            self.worker.throttle.take(self.host_elements)

        return self.worker.ask(run).wait

    def contention(self, seconds: float, start: Start) -> float:
        """By how much updates and what takes `seconds` beside them slow each other down.

        Updates of one subgroup, again and again, with and without the other.
        """
        once = self.updates(1, None)
        repeats = max(1, round(seconds / once))
        alone = [self.updates(repeats, None) for _ in range(_PAIRS)]
        both = [self.updates(repeats, start) for _ in range(_PAIRS)]
        pairs = zip(alone, both, strict=True)
        return contention([Repetition(one, seconds, two) for one, two in pairs]).share

    def updates(self, repeats: int, start: Start | None) -> float:
        """The seconds of so many updates, beside what is started."""
        begin = time.perf_counter()
        wait = start() if start is not None else self.finish
        for _ in range(repeats):
            self.update(self.elements)
        wait()
        self.finish()
        return time.perf_counter() - begin

    def close(self) -> None:
        """Ends the threads."""
        self.worker.close()
        self.memory.close()
