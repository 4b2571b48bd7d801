"""What a loss over a split vocabulary costs one rank: collectives, time, memory, for each way to run it.

With N tokens, D hidden, V_i words of the rank, b bytes per element, k numbers per row: blocks of words
take 8 N D V_i FLOPs, of tokens 6 N D V_i (2 without gradients). A block of words reads x and reads and
writes the sum of its gradient; a block of tokens reads the weight twice and adds to its gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphopt.cost_models import roofline
from graphopt.cost_models.collectives import Collective
from graphopt.cost_models.devices import Cluster
from graphopt.errors import PlanError
from graphopt.vocab_exchange import ALGORITHMS, SplitSizes, Way

# Of a tile of logits: elementwise passes, operations of an exponential at the rate of float32 products
# (as in `graphopt.cost_models.nodes`), and kernels that a block starts.
_PASSES = 5
_EXPONENTIAL_OPS = {"cpu": 40, "cuda": 20}
_KERNELS_PER_BLOCK = 25
_NUMBER_BYTES = 8  # of a row
_BLOCKS = tuple(2**power for power in range(6, 17))


@dataclass(frozen=True, slots=True)
class SplitCost:
    """Of one step on one rank: what it sends, its seconds, and its peak above operands, in bytes."""

    way: Way
    collectives: tuple[Collective, ...]
    sent_bytes: int
    seconds: float
    peak_bytes: int


def exchanges(sizes: SplitSizes, way: Way) -> tuple[Collective, ...]:
    """The collectives of one step, forward then backward.

    >>> sizes = SplitSizes(2048, 512, 32000, 2)
    >>> [len(exchanges(sizes, Way(algorithm, "words", 1024))) for algorithm in ALGORITHMS]
    [3, 2, 2]
    >>> len(exchanges(sizes, Way("one-barrier", "tokens", 256)))
    9
    """
    found: list[Collective] = []
    for rows in _row_counts(sizes, way):
        row = rows * _NUMBER_BYTES
        if way.algorithm == "three-barrier":
            found += [Collective("all_reduce", row), Collective("all_reduce", sizes.numbers * row)]
        else:
            found.append(Collective("all_gather", sizes.numbers * row))
    if sizes.training:
        found.append(Collective("all_reduce", sizes.tokens * sizes.hidden * sizes.dtype.itemsize))
    return tuple(found)


def _row_counts(sizes: SplitSizes, way: Way) -> Iterator[int]:
    if way.stream == "words" or not sizes.training:
        yield sizes.tokens
        return
    for start in range(0, sizes.tokens, way.block):
        yield min(way.block, sizes.tokens - start)


def cost(sizes: SplitSizes, way: Way, cluster: Cluster) -> SplitCost:
    """The cost of one step that runs in this way."""
    found = exchanges(sizes, way)
    seconds = _compute_seconds(sizes, way, cluster) + sum(c.seconds(cluster) for c in found)
    if way.algorithm == "one-barrier":
        seconds -= _hidden_seconds(sizes, way, cluster)
    sent = sum(c.sent_bytes(sizes.ranks) for c in found)
    return SplitCost(way, found, sent, seconds, peak_bytes(sizes, way))


def _compute_seconds(sizes: SplitSizes, way: Way, cluster: Cluster) -> float:
    device = cluster.device
    products = (3 if way.stream == "tokens" else 4) if sizes.training else 1
    pair = sizes.tokens * sizes.own_words
    b, wide = sizes.dtype.itemsize, sizes.wide_bytes
    count = sizes.blocks(way)
    if way.stream == "tokens":
        moved = count * sizes.own_words * sizes.hidden * (2 * b + 2 * wide)
    else:
        moved = count * sizes.tokens * sizes.hidden * (3 * b + 2 * wide)
    passes = _PASSES * (1 if way.stream == "tokens" else 2) * pair * wide
    elementwise = _EXPONENTIAL_OPS[device.kind] * pair * (1 if way.stream == "tokens" else 2)
    flops = 2 * pair * sizes.hidden * products
    started = device.overhead_s * _KERNELS_PER_BLOCK * count
    if way.algorithm == "one-barrier" and sizes.training:  # scaling the mean weight rows
        started += 6 * sizes.tokens * sizes.hidden * wide / device.bytes_per_s
    return started + roofline.seconds(flops, moved + passes, sizes.dtype, device, elementwise)


def _hidden_seconds(sizes: SplitSizes, way: Way, cluster: Cluster) -> float:
    """Of the gathers, what runs beside the product that makes the mean weight rows."""
    if way.stream == "words" or not sizes.training:
        return 0.0
    gathers = [c.seconds(cluster) for c in exchanges(sizes, way)[:-1]]
    product = 2 * sizes.tokens * sizes.own_words * sizes.hidden / cluster.device.flops(sizes.dtype)
    return min(sum(gathers), product)


def peak_bytes(sizes: SplitSizes, way: Way) -> int:
    """The most bytes that one rank holds besides its operands, gradients included."""
    n, words = sizes.tokens, sizes.own_words
    tile = (min(n, way.block), words) if way.stream == "tokens" else (n, min(words, way.block))
    b, wide = sizes.dtype.itemsize, sizes.wide_bytes
    elements = tile[0] * tile[1] * (wide if b == wide else wide + b)
    if sizes.capped:
        elements += tile[0] * tile[1] * wide
    if not sizes.training:
        return elements
    accumulated = words * (wide if way.stream == "tokens" else b) + n * (b if b == wide else wide + b)
    return elements + accumulated * sizes.hidden + n * sizes.hidden * b


def cheapest(
    sizes: SplitSizes,
    cluster: Cluster,
    memory_bytes: int | None = None,
    algorithms: Sequence[str] = ALGORITHMS,
) -> SplitCost:
    """The fastest way within `memory_bytes`, or else within 1.5 times the gradients.

    Where nothing fits, the one of least memory. PlanError where no algorithm can run.

    >>> from graphopt.cost_models.devices import GENERIC_CPU
    >>> cluster = Cluster(GENERIC_CPU, 2, 2e9, 50e-6, "example")
    >>> cheapest(SplitSizes(2048, 512, 32000, 2), cluster).way.stream
    'tokens'
    """
    budget = 1.5 * sizes.gradient_bytes if memory_bytes is None else memory_bytes
    ways = [Way(a, s, b) for a in algorithms for s in _streams(sizes) for b in _BLOCKS]
    tried = [cost(sizes, w, cluster) for w in ways if not (sizes.capped and w.algorithm == "one-barrier")]
    if not tried:
        raise PlanError("the one-barrier algorithm has no soft cap; take two-barrier")
    fitting = [c for c in tried if c.peak_bytes <= budget]
    if not fitting:
        return min(tried, key=lambda c: (c.peak_bytes, c.seconds))
    return min(fitting, key=lambda c: c.seconds)


def _streams(sizes: SplitSizes) -> tuple[str, ...]:
    return ("tokens", "words") if sizes.training else ("words",)
