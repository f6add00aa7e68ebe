"""Speaks for a peer of a bench program: one JSON object on stdout for each line of stdin."""

import json
import os
import sys
import time

# What libraries print goes to stderr; stdout belongs to the measurements.
_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def _say(line):
    _out.write(json.dumps(line) + "\n")
    _out.flush()


def _peak_megabytes():
    with open("/proc/self/status") as status:
        return next((float(line.split()[1]) * 1024e-6 for line in status if line.startswith("VmHWM:")), 0.0)


def serve(step, note=None):
    """`step()` does the work once and returns the amount done; the caller has warmed up."""
    _say({"ready": True, "note": note})
    for _ in sys.stdin:
        processor, start = time.process_time(), time.perf_counter()
        amount = step()
        seconds = time.perf_counter() - start
        _say({"seconds": seconds, "processor-seconds": time.process_time() - processor, "amount": float(amount),
              "peak-mb": _peak_megabytes()})
