"""Time and memory of the report on one of eight ranks of a Llama of 70e9 parameters.

    python benchmarks/mesh_report.py

`graphopt report llama --mesh tp=8` runs in a process of its own, as a user starts it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import LLAMA_70B, note, table, write

STEP = ["--device", "h100", "--batch", "1", "--seq", "4096", "--dtype", "bfloat16"]
CASES: dict[str, list[str]] = {
    "tp=8": ["--mesh", "tp=8"],
    "dp=2,tp=8": ["--mesh", "dp=2,tp=8"],
}


def measured(arguments: list[str]) -> dict[str, Any]:
    """One run of the command: seconds, the most resident memory, and what the report says."""
    sizes = ",".join(f"{key}={value}" for key, value in LLAMA_70B.items())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        command = [sys.executable, "-m", "graphopt", "report", "llama", "--set", sizes]
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, *STEP, *arguments, "--json", str(file)], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit(f"the command ended with status {os.waitstatus_to_exitcode(status)}")
        report = json.loads(file.read_text())
    return {"seconds": seconds, "resident_bytes": _resident(usage), **_facts(report)}


def _resident(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * 1024


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    mesh, graph = report["mesh"], report["graphs"][0]
    return {
        "operators": graph["operators"],
        "peak_bytes": report["predicted_peak_bytes"],
        "compute_seconds": mesh["compute_seconds"],
        "communication_seconds": mesh["communication_seconds"],
        "exposed_seconds": mesh["exposed_seconds"],
        "collectives": sum(row["count"] for row in mesh["collectives"]),
        "sent_bytes": sum(row["sent_bytes"] for row in mesh["collectives"]),
    }


def main() -> None:
    """All cases."""
    found = []
    for name, arguments in CASES.items():
        found.append({"case": name, **measured(arguments)})
        note(f"{name}: {found[-1]}")
    head = ["mesh", "s", "resident GB", "operators", "peak GB", "computing ms", "collectives"]
    head += ["sent GB", "communication ms", "exposed ms"]
    rows = [
        [
            r["case"],
            f"{r['seconds']:.1f}",
            f"{r['resident_bytes'] / 1e9:.2f}",
            r["operators"],
            f"{r['peak_bytes'] / 1e9:.1f}",
            f"{r['compute_seconds'] * 1e3:.0f}",
            r["collectives"],
            f"{r['sent_bytes'] / 1e9:.1f}",
            f"{r['communication_seconds'] * 1e3:.0f}",
            f"{r['exposed_seconds'] * 1e3:.0f}",
        ]
        for r in found
    ]
    text = (
        "`graphopt report llama --mesh ...` of 80 layers, one text of 4096 tokens, bfloat16, on H100s "
        "(predicted), in a process of its own: its time and most resident memory, and what it says of "
        f"one rank.\n\n{table(head, rows)}"
    )
    write("mesh_report", "The report on one rank of a mesh", found, text)


if __name__ == "__main__":
    main()
