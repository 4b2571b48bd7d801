"""Published pipeline schedules beside what the simulator says.

    python benchmarks/published_pipeline.py

SkipPipe: the published paths of four methods on 20 nodes run under the rule of the published simulator.

Vocabulary parallelism: iteration times from published pass times, in the order of the published code, of
the planner, and of a device that takes whatever has arrived. The rows with the vocabulary split give
mean pass times only; what the devices differ by is taken from the other rows of the same machine. What an
iteration takes beside its passes (the optimizer, for one) is read off the baseline's row.

The tables of MFU and memory, which give no pass times, are compared by which method is better, with rates
from those rows. Not compared is the MFU of "interlaced": nothing here says what its all-reduces take.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_run import StageRun, run_greedy, run_orders
from graphopt.cost_models.stage_tasks import StageStep, StageTasks
from graphopt.errors import PlanError
from graphopt.passes.stage_orders import SPLIT, orders_of, stages_of
from graphopt.passes.stage_partition import even_stages
from graphopt.passes.stage_routes import Routing
from graphopt.passes.stage_vocab import VocabularyCost, barriers, vocabulary_run, vocabulary_step

DATA = Path(__file__).with_name("data")
BAR_SKIPPIPE, BAR_TIME, BAR_MEMORY = 0.02, 0.02, 0.04
TIE = 0.02  # methods whose published figures differ by less may come in either order
# Float32 copies alive at the peak, fitted to 24 cells: of the local logits; and, where the vocabulary is
# split, of hidden states (broadcast to all devices, their gradients, embeddings of microbatches ahead).
LOGITS_COPIES, HIDDEN_COPIES = 3.0, 13.0
BLOCK = 2048  # words of the logits that are there at a time, where they are streamed
GIB = 2**30


def read(name: str) -> Any:
    """A table of `benchmarks/data`."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


# --- SkipPipe -----------------------------------------------------------------------------------


def skippipe_links(data: Mapping[str, Any], places: Sequence[str], repaired: bool = False) -> StageLinks:
    """The links between nodes at `places`; `repaired`: NL-London without its slip of units."""
    overhead = data["overhead_s"]
    pairs = {}
    for key, (latency_ms, gib_per_s) in data["links_ms_and_gib_per_s"].items():
        rate = gib_per_s * GIB * (1024 if repaired and key == "NL-London" else 1)
        pairs[frozenset(key.split("-"))] = latency_ms / 1e3 + overhead, rate
    latency_ms, gib_per_s = data["within_a_location"]
    for place in data["locations"]:
        pairs[frozenset((place,))] = latency_ms / 1e3 + overhead, gib_per_s * GIB
    return StageLinks.between_places(places, pairs)


def skippipe_routing(
    data: Mapping[str, Any],
    visited: int,
    is_placed: bool = True,
    repaired: bool = False,
    microbatches: int = 30,
) -> Routing:
    """The published instance, with as many microbatches from each node of the first stage."""
    count = len(data["locations"])
    places = [data["locations"][i % count] for i in range(data["nodes"])]
    half = data["backward_s"] / 2
    cost = StageCost(data["forward_s"], half, half, output_bytes=data["transfer_bytes"])
    return Routing(
        (cost,) * len(data["stage_nodes"]),
        skippipe_links(data, places, repaired),
        tuple(map(tuple, data["stage_nodes"])),
        microbatches,
        visited,
        data["memory"],
        data["head_s"],
        data["pause_s"],
        is_placed=is_placed,
    )


def skippipe_step(data: Mapping[str, Any], run: Mapping[str, Any]) -> StageTasks:
    """The tasks of a published run: a path has several slots, and a slot several microbatches in turn."""
    routing = skippipe_routing(data, data["visited_stages"])
    stage = {node: s for s, row in enumerate(data["stage_nodes"]) for node in row}
    step = StageStep(routing.costs, routing.links, head_s=routing.head_s)
    last: dict[tuple[int, int], str] = {}
    microbatch = 0
    for turn in range(run["rounds"]):
        for slot in range(run["slots"]):
            for place, nodes in enumerate(run["paths"]):
                begin = turn * run["round_s"] + slot * run["slot_s"]
                after = [last[slot, place]] if turn else []
                step.add_path(microbatch, tuple((stage[n], n) for n in nodes), begin, after)
                last[slot, place] = f"0B{microbatch}"
                microbatch += 1
    return step.step(data["nodes"], [(stage[n],) for n in range(data["nodes"])], routing.pause_s)


def skippipe() -> list[dict[str, Any]]:
    """One row for each published run: seconds, microbatches, and the error."""
    data = read("skippipe")
    rows = []
    for name, run in data["runs"].items():
        found = run_greedy(skippipe_step(data, run), data["memory"])
        count = sum(task.name.startswith("0B") for task in found.step.tasks)
        published = run["published_s"]
        row = {"run": name, "microbatches": count, "seconds": (published, found.seconds)}
        rows.append(row | {"error": found.seconds / published - 1})
    return rows


# --- vocabulary parallelism ---------------------------------------------------------------------


def parameters(layers: float, hidden: int, vocabulary: float) -> float:
    """Of so many layers and rows of one vocabulary matrix."""
    return 12 * hidden**2 * layers + hidden * vocabulary


def device_factors(data: Mapping[str, Any]) -> np.ndarray:
    """How much slower each device is than their mean, from the passes of layers only."""
    ratios: list[list[float]] = [[] for _ in range(8)]
    for row in data["pass_times_us"].values():
        for first, name in ((0, "forward"), (1, "backward")):
            own = range(first, 7)  # the last has the head, the first one's backward the embedding
            times = {d: row[name][d] / row["layers"][d] for d in own}
            mean = sum(times.values()) / len(times)
            for d in own:
                ratios[d].append(times[d] / mean)
    return np.array([sum(row) / len(row) if row else 1.0 for row in ratios])


def one_f_one_b(costs: Sequence[StageCost], microbatches: int, schedule: str = "1f1b") -> StageRun:
    """Stages on as many devices (v-half: half as many) in the published order."""
    devices = len(costs) // (2 if schedule == "v-half" else 1)
    held = stages_of(schedule, devices)
    place = {stage: d for d, row in enumerate(held) for stage in row}
    step = StageStep(costs, StageLinks.even(devices), schedule in SPLIT, len(held[0]))
    for j in range(microbatches):
        step.add_path(j, tuple((s, place[s]) for s in range(len(costs))))
    tasks = step.step(devices, held)
    return run_orders(tasks, tasks.indices(orders_of(schedule, devices, microbatches)))


def published_order(
    devices: int, microbatches: int, waited: int, forward: float, backward: float
) -> list[list[str]]:
    """What the published code runs: after the forwards of the start, T of a microbatch and S of the next
    between a backward and a forward, or behind both, by how far the device is from the last one.
    """
    behind, ahead, offset = [False] * devices, [0] * devices, 0.0
    for d in range(devices - 2, -1, -1):
        behind[d] = offset - forward < -backward
        offset += backward - forward if behind[d] else -forward
        ahead[d] = ahead[d + 1] + (behind[d] or not behind[d + 1])
    rows = []
    for d in range(devices):
        passes = "F" * (devices - d) + "XF" * waited + "X" * ahead[d]
        passes += ("BFX" if behind[d] else "BXF") * (microbatches + 1)
        count = dict.fromkeys("FBX", 0)
        row = []
        for kind in passes:
            j = count[kind]
            count[kind] += 1
            if kind == "X":
                row += [f"{d}T{j - 1}"] * (1 <= j <= microbatches)
                row += [f"{d}S{j}", f"{d}E{j}"] * (j < microbatches)
            elif j < microbatches:
                row.append(f"{d}{kind}{j}")
        rows.append(row)
    return rows


def vocabulary_costs(
    data: Mapping[str, Any], row: Mapping[str, Any]
) -> tuple[list[StageCost], VocabularyCost]:
    """Costs in seconds of a row with the vocabulary split."""
    costs = [
        StageCost(f * row["forward"] / 1e3, *(f * row["backward"] / 2e3,) * 2)
        for f in device_factors(data)
    ]
    share = 1 / 3 if row["method"] == "vocab-1" else 2 / 3  # of three products, those in S
    both = row["s_and_t"] / 1e3
    return costs, VocabularyCost(share * both, (1 - share) * both, embedding_s=row["input"] / 1e3)


def vocabulary_times() -> list[dict[str, Any]]:
    """One row for each published iteration: milliseconds in several orders, live microbatches, memory."""
    data, rows = read("vocabulary_pipeline"), []
    count, model = data["microbatches"], data["models_1f1b"]["8"]
    beside_s = None
    for name, row in data["pass_times_us"].items():
        pairs = zip(row["forward"], row["backward"], strict=True)
        run = one_f_one_b([StageCost(f / 1e6, b / 2e6, b / 2e6) for f, b in pairs], count)
        if beside_s is None:
            beside_s = row["iteration_ms"] / 1e3 - run.seconds
        rows.append(_time_row(name, row, model, run.seconds + beside_s, max(run.peaks()[0]), {}))
    for row in data["pass_times_ms"]:
        costs, split = vocabulary_costs(data, row)
        method, extra = row["method"], beside_s or 0.0
        step = vocabulary_step("1f1b", method, costs, split, count)
        order = published_order(8, count, barriers(method), row["forward"], row["backward"])
        run = run_orders(step, step.indices(order))
        ours = vocabulary_run("1f1b", method, costs, split, count)
        if max(ours.peaks()[0]) != max(run.peaks()[0]):
            raise PlanError("the planner's order holds another number of microbatches")
        others = {"planner_ms": 1e3 * (ours.seconds + extra)}
        rows.append(_time_row(method, row, model, run.seconds + extra, max(run.peaks()[0]), others))
    return rows


def _time_row(
    name: str,
    row: Mapping[str, Any],
    model: Any,
    seconds: float,
    live: float,
    others: Mapping[str, float],
) -> dict[str, Any]:
    published = row["iteration_ms"]
    predicted = memory_gib(name, 8, model, row["sequence"], row["vocabulary"])
    found = {"method": name, "sequence": row["sequence"], "vocabulary": row["vocabulary"]}
    found |= {"iteration_ms": (published, 1e3 * seconds), "error": 1e3 * seconds / published - 1}
    allocated = row["allocated_mib"] / 1024
    return found | {"live": live, "gib": (allocated, predicted), **others}


def greedy_times() -> list[dict[str, Any]]:
    """How much longer 1F1B with the vocabulary takes when devices take whatever has arrived."""
    data, rows = read("vocabulary_pipeline"), []
    for row in data["pass_times_ms"]:
        costs, split = vocabulary_costs(data, row)
        method = row["method"]
        step = vocabulary_step("1f1b", method, costs, split, data["microbatches"])
        static = vocabulary_run("1f1b", method, costs, split, data["microbatches"]).seconds
        found = {"method": method, "sequence": row["sequence"], "vocabulary": row["vocabulary"]}
        for rule, bias in RULES.items():
            later = [bias.get(task.name.lstrip("0123456789")[0], 0.0) for task in step.tasks]
            try:
                taken = run_greedy(step, 8 + barriers(method), later).seconds / static - 1
            except PlanError:
                taken = float("inf")
            found[rule] = taken
        rows.append(found)
    return rows


# Seconds that passes of a kind count as having come later; "first come" has none.
RULES: dict[str, dict[str, float]] = {
    "first come": {},
    "vocabulary first": {"S": -1e3, "T": -1e3},
    "backward first": {"B": -1e3},
    "vocabulary last": {"S": 1e3, "T": 1e3},
}


def memory_gib(
    method: str,
    devices: int,
    model: Mapping[str, int],
    sequence: int,
    vocabulary: int,
    block: int | None = None,
) -> float:
    """The peak of the fullest device: 16 bytes a parameter, 34 of each activation, and the logits.

    `block`: of the logits no more than so many words are there at a time.
    """
    layers, hidden = model["layers"] / devices, model["hidden"]
    live = 34 * sequence * hidden * layers
    logits = LOGITS_COPIES * 4 * sequence * vocabulary
    if block is not None:
        logits = (
            LOGITS_COPIES * 4 * sequence * block * (1 if method in ("baseline", "redis") else devices)
        )
    if method in ("baseline", "redis"):
        one = 16 * parameters(layers, hidden, vocabulary)
        return max(one + devices * live, one + live + logits) / GIB
    split = 16 * parameters(layers, hidden, 2 * vocabulary / devices) + logits / devices
    split += HIDDEN_COPIES * 4 * sequence * hidden
    held = 1.5 * devices if method == "interlaced" else devices + barriers(method)
    return (split + held * live) / GIB


def memory_rows() -> list[dict[str, Any]]:
    """The 24 cells of 8 devices whose memory the model was fitted to, and the errors."""
    data, rows = read("vocabulary_pipeline"), []
    for sequence in (2048, 4096):
        for method in ("baseline", "vocab-1", "vocab-2"):
            cells = data["table_5"][f"8 {sequence}"][method]["gib"]
            for vocabulary, published in zip(data["vocabularies"], cells, strict=True):
                found = memory_gib(method, 8, data["models_1f1b"]["8"], sequence, vocabulary)
                row = {"method": method, "sequence": sequence, "vocabulary": vocabulary}
                rows.append(row | {"gib": (published, found), "error": found / published - 1})
    return rows


def streamed_rows() -> list[dict[str, Any]]:
    """What the 24 cells would take if logits were made in blocks, and made again for the gradients.

    Where there are pass times, also milliseconds of an iteration, S and T with 8 in place of 6 FLOPs.
    """
    data, rows = read("vocabulary_pipeline"), memory_rows()
    timed = {(r["method"], r["sequence"], r["vocabulary"]): r for r in data["pass_times_ms"]}
    for row in rows:
        key = row["method"], row["sequence"], row["vocabulary"]
        row["streamed"] = memory_gib(key[0], 8, data["models_1f1b"]["8"], *key[1:], block=BLOCK)
        if key in timed:
            costs, split = vocabulary_costs(data, timed[key])
            both = split.s_s + split.t_s
            more = replace(split, **{"vocab-1": {"t_s": both}, "vocab-2": {"t_s": 2 * split.t_s}}[key[0]])
            seconds = [
                vocabulary_run("1f1b", key[0], costs, cost, data["microbatches"]).seconds
                for cost in (split, more)
            ]
            row["longer"] = seconds[1] / seconds[0] - 1
    return rows


def rates(data: Mapping[str, Any]) -> dict[str, float]:
    """FLOP/s of layers, of the whole head, and of its split passes, from the rows with pass times."""
    model, row = data["models_1f1b"]["8"], data["pass_times_us"]["baseline"]
    layer, head = _flops(model["hidden"], row["sequence"], row["vocabulary"])
    forward, backward = np.array(row["forward"]) / 1e6, np.array(row["backward"]) / 1e6
    own, own_back = forward[:7].mean(), backward[1:7].mean()
    found = {"forward": 4 * layer / own, "backward": 8 * layer / own_back}
    found |= {"head": head / (forward[7] - own), "head_backward": 2 * head / (backward[7] - own_back)}
    for split in (
        r for r in data["pass_times_ms"] if r["vocabulary"] == 256000 and r["sequence"] == 2048
    ):
        found[split["method"]] = 3 * head / 8 / (split["s_and_t"] / 1e3)
    return found


def _flops(hidden: int, sequence: int, vocabulary: int) -> tuple[int, int]:
    """Of a forward through a layer, and through the head."""
    return sequence * hidden * (24 * hidden + 4 * sequence), 2 * sequence * hidden * vocabulary


def table_cell(
    data: Mapping[str, Any],
    schedule: str,
    devices: int,
    sequence: int,
    vocabulary: int,
    microbatches: int,
) -> dict[str, float]:
    """MFU in percent of each method in one cell, with the rates of the 8 devices."""
    models = data["models_1f1b" if schedule == "1f1b" else "models_v_half"]
    model, speed = models[str(devices)], rates(data)
    layer, head = _flops(model["hidden"], sequence, vocabulary)
    count = devices * (2 if schedule == "v-half" else 1)

    def stage(layers: float, has_head: bool) -> StageCost:
        back = (2 * layers * layer / speed["backward"] + has_head * 2 * head / speed["head_backward"]) / 2
        return StageCost(layers * layer / speed["forward"] + has_head * head / speed["head"], back, back)

    each = model["layers"] // count
    plain = [stage(each, s == count - 1) for s in range(count)]
    seconds = {"baseline": one_f_one_b(plain, microbatches, schedule).seconds}
    if schedule == "1f1b":
        units = [stage(1, False).seconds] * model["layers"] + [stage(0, True).seconds]
        parts = even_stages(units, devices)
        moved = [
            stage(len([u for u in part if u < model["layers"]]), model["layers"] in part)
            for part in parts
        ]
        seconds["redis"] = one_f_one_b(moved, microbatches).seconds
    for method in ("vocab-1", "vocab-2") if schedule == "1f1b" else ("vocab-1",):
        both = 3 * head / devices / speed[method]
        share = 1 / 3 if method == "vocab-1" else 2 / 3
        split = VocabularyCost(share * both, (1 - share) * both)
        costs = [stage(each, False)] * count
        seconds[method] = vocabulary_run(schedule, method, costs, split, microbatches).seconds
    work = 3 * (head + model["layers"] * layer) * microbatches / devices / data["peak_flops_per_s"]
    return {method: 100 * work / taken for method, taken in seconds.items()}


def inversions(published: Mapping[str, float], found: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs of methods that come in the other order, where published figures differ by more than TIE."""
    names = [name for name in published if name in found]
    return [
        (a, b)
        for a in names
        for b in names
        if published[a] > published[b] * (1 + TIE) and found[a] < found[b]
    ]


def orderings(microbatches: int = 128, most_devices: int = 32) -> list[dict[str, Any]]:
    """One row for each cell of the tables: published and simulated figures, and the inversions."""
    data, rows = read("vocabulary_pipeline"), []
    for table, schedule in (("table_5", "1f1b"), ("table_6", "v-half")):
        for key, methods in data[table].items():
            devices, sequence = map(int, key.split())
            if devices > most_devices:
                continue
            model = data["models_1f1b" if schedule == "1f1b" else "models_v_half"][str(devices)]
            for place, vocabulary in enumerate(data["vocabularies"]):
                mfu = {m: cell["mfu"][place] for m, cell in methods.items() if cell["mfu"][place]}
                gib = {m: cell["gib"][place] for m, cell in methods.items() if cell["gib"][place]}
                found = table_cell(data, schedule, devices, sequence, vocabulary, microbatches)
                memory = {m: cell_gib(schedule, m, devices, model, sequence, vocabulary) for m in gib}
                rows.append(
                    {
                        "schedule": schedule,
                        "devices": devices,
                        "sequence": sequence,
                        "vocabulary": vocabulary,
                        "mfu": {m: (mfu.get(m), found[m]) for m in found},
                        "gib": {m: (gib[m], memory[m]) for m in gib},
                        "inversions": [*inversions(mfu, found), *inversions(gib, memory)],
                    }
                )
    return rows


def cell_gib(
    schedule: str, method: str, devices: int, model: Mapping[str, int], sequence: int, vocabulary: int
) -> float:
    """The peak of the fullest device; in the V shape, the first one has both ends of the model."""
    if schedule == "1f1b":
        return memory_gib(method, devices, model, sequence, vocabulary)
    layers, hidden = model["layers"] / devices, model["hidden"]
    live, logits = 34 * sequence * hidden * layers, LOGITS_COPIES * 4 * sequence * vocabulary
    held = devices / 2 + 1
    if method == "baseline":
        return (16 * parameters(layers, hidden, 2 * vocabulary) + held * live + logits) / GIB
    split = 16 * parameters(layers, hidden, 2 * vocabulary / devices) + logits / devices
    split += HIDDEN_COPIES * 4 * sequence * hidden
    return (split + (held + barriers(method)) * live) / GIB


# --- tables -------------------------------------------------------------------------------------


def text_of(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """The tables, and how far the bars are met."""
    from harness import table

    skip = [[r["run"], r["microbatches"], *_three(*r["seconds"])] for r in results["skippipe"]]
    worst = max(abs(r["error"]) for r in results["skippipe"])
    times = [
        [
            *(r[k] for k in ("method", "sequence", "vocabulary")),
            *_three(*r["iteration_ms"]),
            f"{r['planner_ms']:.1f}" if "planner_ms" in r else "",
            f"{r['live']:g}",
            *_three(*r["gib"]),
        ]
        for r in results["times"]
    ]
    late = max(abs(r["error"]) for r in results["times"])
    greedy = [
        [*(r[k] for k in ("method", "sequence", "vocabulary")), *(f"{r[k]:+.1%}" for k in RULES)]
        for r in results["greedy"]
    ]
    memory = max(abs(r["error"]) for r in results["memory"])
    streamed = [
        [
            *(r[k] for k in ("method", "sequence", "vocabulary")),
            f"{r['gib'][1]:.2f}",
            f"{r['streamed']:.2f}",
            f"{1 - r['streamed'] / r['gib'][1]:.1%}",
            f"{r['longer']:+.1%}" if "longer" in r else "",
        ]
        for r in results["streamed"]
    ]
    wrong = [r for r in results["orderings"] if r["inversions"]]
    blocks = [
        "Published paths of SkipPipe's instance, seconds.",
        table(["run", "microbatches", "published", "simulated", "error"], skip),
        f"Worst error {worst:.2%} (bar {BAR_SKIPPIPE:.0%}: {worst <= BAR_SKIPPIPE}).",
        "Vocabulary parallelism, 8 devices, 128 microbatches: milliseconds in the published order and in "
        "the planner's, live microbatches, GiB.",
        table(
            [
                *("method", "sequence", "vocabulary", "published ms", "simulated", "error"),
                *("planner's order", "live", "published GiB", "model", "error"),
            ],
            times,
        ),
        f"Worst error of a time {late:.2%} (bar {BAR_TIME:.0%}: {late <= BAR_TIME}), of the memory of 24 "
        f"cells {memory:.2%} (bar {BAR_MEMORY:.0%}: {memory <= BAR_MEMORY}).",
        f"The same cells with the logits in blocks of {BLOCK} words, made again for the gradients "
        "(simulated; nobody has published such a run): GiB, and how much longer an iteration takes.",
        table(["method", "sequence", "vocabulary", "GiB", "streamed", "less", "longer"], streamed),
        "How much longer a device takes that runs whatever has arrived, by which pass it prefers:",
        table(["method", "sequence", "vocabulary", *RULES], greedy),
        f"Order of methods in {len(results['orderings'])} cells of the tables of MFU and memory (figures "
        f"within {TIE:.0%} may come either way): {len(wrong)} with an inversion.",
        *(
            f"- {r['schedule']} {r['devices']} {r['sequence']} {r['vocabulary']}: {r['inversions']}"
            for r in wrong
        ),
    ]
    return "\n\n".join(blocks)


def _three(published: float, predicted: float) -> list[str]:
    return [f"{published:.2f}", f"{predicted:.2f}", f"{predicted / published - 1:+.2%}"]


def main() -> None:
    """All tables, written to `results`."""
    from harness import setup, write

    setup()
    results = {"skippipe": skippipe(), "times": vocabulary_times(), "greedy": greedy_times()}
    results |= {"memory": memory_rows(), "streamed": streamed_rows(), "orderings": orderings()}
    write("published_pipeline", "Published pipelines, simulated", results, text_of(results))


if __name__ == "__main__":
    main()
