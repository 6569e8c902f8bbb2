"""How long `streamlstm --help` takes, the whole process: at most 150 ms, or this exits 1."""

import statistics
import subprocess
import sys
import time

LIMIT_MS = 150
TIMES = 15

took_ms = []
for _ in range(TIMES):
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "streamlstm.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
    took_ms.append((time.perf_counter() - begun) * 1000)
median = statistics.median(took_ms)
print(f"--help: {median:.0f} ms (median of {TIMES}; from {min(took_ms):.0f} to {max(took_ms):.0f}; limit {LIMIT_MS})")
sys.exit(median > LIMIT_MS)
