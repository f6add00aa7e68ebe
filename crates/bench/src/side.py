"""Runs a peer of a bench program: prints one JSON object for each line of stdin."""

import json
import multiprocessing
import os
import sys
import time

# Output of libraries goes to stderr; stdout is for measurements.
_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def _print(line):
    _out.write(json.dumps(line) + "\n")
    _out.flush()


def _peak_megabytes():
    with open("/proc/self/status") as status:
        return next((float(line.split()[1]) * 1024e-6 for line in status if line.startswith("VmHWM:")), 0.0)


def _processor_seconds():
    """Processor time of this process and its live workers."""
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        with open(f"/proc/{worker.pid}/stat") as stat:
            user, system = stat.read().rsplit(")", 1)[1].split()[11:13]
        seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


def serve(step, note=None):
    """`step()` does the work once and returns the amount done; the caller has warmed up."""
    _print({"ready": True, "note": note})
    for _ in sys.stdin:
        processor, start = _processor_seconds(), time.perf_counter()
        amount = step()
        seconds = time.perf_counter() - start
        _print({"seconds": seconds, "processor-seconds": _processor_seconds() - processor,
              "amount": float(amount), "peak-mb": _peak_megabytes()})
