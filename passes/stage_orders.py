"""The published pipeline schedules: what each device runs, in which order.

Stages are numbered along the model. With one stage per device, stage s is on device s. With several,
they go around (interleaved), or down and up again (the V shapes).

    gpipe        all forwards, then all backwards (Huang et al., NeurIPS 2019)
    1f1b         PipeDream-Flush (Narayanan et al., ICML 2021)
    interleaved  several stages per device (Narayanan et al., SC 2021)
    zb-h1        backwards in two parts, in the memory of 1f1b (Qi et al., ICLR 2024)
    zbv          two stages per device in a V, no bubble in the memory of 1f1b (Qi et al., ICLR 2024)
    v-half       the same with half the memory (Qi et al., NeurIPS 2024, arXiv 2405.15362)
"""

from collections.abc import Iterator, Sequence

from graphopt.errors import PlanError

Orders = tuple[tuple[str, ...], ...]

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "v-half")
SPLIT = ("zb-h1", "zbv", "v-half")  # those that split the backward
V_SHAPED = ("zbv", "v-half")


def stages_of(schedule: str, devices: int, per_device: int = 2) -> tuple[tuple[int, ...], ...]:
    """The stages on each device.

    >>> stages_of("zbv", 3)
    ((0, 5), (1, 4), (2, 3))
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if schedule in V_SHAPED:
        return tuple((d, 2 * devices - 1 - d) for d in range(devices))
    if schedule == "interleaved":
        return tuple(tuple(range(d, devices * per_device, devices)) for d in range(devices))
    return tuple((d,) for d in range(devices))


def orders_of(schedule: str, devices: int, microbatches: int, per_device: int = 2) -> Orders:
    """The order of each device; PlanError for numbers that the schedule is not defined for.

    >>> orders_of("1f1b", 2, 3)
    (('0F0', '0F1', '0B0', '0F2', '0B1', '0B2'), ('1F0', '1B0', '1F1', '1B1', '1F2', '1B2'))
    """
    held = stages_of(schedule, devices, per_device)
    if microbatches < 1 or devices < 1:
        raise PlanError(f"{schedule}: {microbatches} microbatches on {devices} devices")
    if schedule == "v-half":
        return _v_half(devices, microbatches)
    rows = []
    for device in range(devices):
        if schedule == "gpipe":
            row = [f"{device}{kind}{j}" for kind in "FB" for j in range(microbatches)]
        elif schedule == "interleaved":
            row = list(_interleaved(device, held[device], devices, microbatches))
        elif schedule == "zbv":
            row = list(_zbv(device, devices, microbatches))
        else:
            warm_up = min(devices - device, microbatches)
            row = list(_one_f_one_b(device, warm_up, microbatches, schedule == "zb-h1"))
        rows.append(tuple(row))
    return tuple(rows)


def _one_f_one_b(stage: int, warm_up: int, microbatches: int, split: bool) -> Iterator[str]:
    """1F1B; where `split`, stage s is s microbatches late with gradients of weights.

    So every device holds as many activations as the first one, and the last gradients fill the end.
    """
    for j in range(warm_up):
        yield f"{stage}F{j}"
    for j in range(microbatches):
        yield f"{stage}{'I' if split else 'B'}{j}"
        if split and j >= stage:
            yield f"{stage}W{j - stage}"
        if j + warm_up < microbatches:
            yield f"{stage}F{j + warm_up}"
    if split:
        for j in range(max(0, microbatches - stage), microbatches):
            yield f"{stage}W{j}"


def _interleaved(device: int, held: Sequence[int], devices: int, microbatches: int) -> Iterator[str]:
    """Groups of as many microbatches as devices go through all stages of a device, then the next."""
    if microbatches % devices:
        raise PlanError(
            f"interleaved: {microbatches} microbatches are no multiple of the {devices} devices"
        )
    count = len(held)
    visits = [
        (stage, group * devices + k)
        for group in range(microbatches // devices)
        for stage in range(count)
        for k in range(devices)
    ]
    backward = [(count - 1 - stage, j) for stage, j in visits]
    warm_up = min(len(visits), 2 * (devices - 1 - device) + (count - 1) * devices)
    for stage, j in visits[:warm_up]:
        yield f"{held[stage]}F{j}"
    for place, (stage, j) in enumerate(backward):
        if place + warm_up < len(visits):
            yield f"{held[visits[place + warm_up][0]]}F{visits[place + warm_up][1]}"
        yield f"{held[stage]}B{j}"


def _zbv(device: int, devices: int, microbatches: int) -> Iterator[str]:
    """Down the V with as much as the memory of 1F1B holds, then a pass of each kind in turn."""
    down, up = device, 2 * devices - 1 - device
    if microbatches < 2 * devices - 1:
        raise PlanError(f"zbv: {devices} devices take {2 * devices - 1} microbatches or more")
    ahead = 2 * (devices - device) - 1
    yield from (f"{down}F{j}" for j in range(ahead))
    for k in range(device):
        yield f"{up}F{k}"
        yield f"{down}F{ahead + k}"
    for k in range(devices - device):
        yield from (f"{up}F{device + k}", f"{up}I{k}", f"{up}W{k}")
    lead, begun = ahead + device, devices - device  # forwards down, and backwards up, until here
    for k in range(microbatches - devices):
        if lead + k < microbatches:
            yield f"{down}F{lead + k}"
        yield from (f"{down}I{k}", f"{down}W{k}")
        yield f"{up}F{devices + k}"
        yield from (f"{up}I{begun + k}", f"{up}W{begun + k}")
    down_done, up_done = microbatches - devices, microbatches - device
    for k in range(device):
        yield from (f"{down}I{down_done + k}", f"{up}I{up_done + k}")
    for k in range(device, devices):
        yield from (f"{down}I{down_done + k}", f"{down}W{down_done + k - device}")
    yield from (f"{up}W{j}" for j in range(up_done, microbatches))
    yield from (f"{down}W{j}" for j in range(microbatches - device, microbatches))


def _v_half(devices: int, microbatches: int) -> Orders:
    """Every pass in a slot of its own of a period of six, by device; weights where a slot is free.

    The slots are those of the paper for an even number of devices; for an odd one, the backward begins
    as much later as it takes for no two passes to share a slot.
    """
    rows = []
    for device, slots in enumerate(v_half_slots(devices)):
        timed = [
            (slot + 6 * j, f"{stage}{kind}{j}")
            for (stage, kind), slot in slots.items()
            for j in range(microbatches)
        ]
        assert len({slot % 6 for slot in slots.values()}) == 6, device
        rows.append(tuple(name for _, name in sorted(timed)))
    return tuple(rows)


def v_half_slots(devices: int, late: int = 0) -> list[dict[tuple[int, str], int]]:
    """For each device, the slot of each (stage, kind) of microbatch 0; a period is six slots.

    `late` slots (a multiple of six) lie between the last forward and the first backward besides those
    that the schedule needs: room for barriers.
    """
    found = []
    for device in range(devices):
        down, up = device, 2 * devices - 1 - device
        odd = 3 * (devices % 2)  # three slots later, the forward on the way up takes none that is taken
        slots = {
            (down, "F"): 2 * device,
            (up, "F"): 3 * devices - device - 2 + odd,
            (up, "I"): 3 * devices + 2 + 2 * device + odd + late,
            (down, "I"): 6 * devices + 1 - device + 2 * odd + late,
        }
        for stage in (up, down):
            taken = {slot % 6 for slot in slots.values()}
            after = slots[stage, "I"] + 1
            slots[stage, "W"] = next(s for s in range(after, after + 6) if s % 6 not in taken)
        found.append(slots)
    return found
