"""
Accuracy by the prequential, leak-free protocol, from the command line a user would type.

    python bench/accuracy.py [DATA_DIR]

For each data set and horizon: `streamlstm replay` with a configuration from `config/`, values standardised by the first
20 % of the rows, scored over the last 75 %, one pass from the first record. Last value and seasonal naive are scored on
the same pairs in the same run.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = {
    "ETTh2": ("ETTh2.csv", "config/etth2.yaml", 14_400, 2_880, 3_600),
    "WTH": ("WTH.csv", "config/wth.yaml", 35_064, 7_012, 8_766),
}


def replay(data: Path, config: str, rows: int, standardise: int, score_from: int, horizons: int) -> list[dict]:
    """The scores of one run, by horizon."""
    command = [
        *(sys.executable, "-m", "streamlstm.cli.main", "replay", "-c", str(ROOT / config), "--from", str(data)),
        *("--rows", str(rows), "--standardise", str(standardise), "--score-from", str(score_from)),
        *("--set", f"model.horizons={horizons}", "--json"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["scores"]


def over_all(scores: list[dict], measure: str, expert: str) -> float:
    """The mean over all pairs of the horizons."""
    rows = [score for score in scores if isinstance(score["horizon"], int)]
    pairs = [row["pairs"][expert] for row in rows]
    return sum(row[measure][expert] * n for row, n in zip(rows, pairs, strict=True)) / sum(pairs)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    print(f"{'data':<8}{'H':>4}{'lstm MSE':>10}{'MAE':>8}{'last value':>12}{'seasonal':>10}{'skill':>8}{'s':>7}")
    for name, (file, *arguments) in SETS.items():
        for horizons in (1, 24, 48):
            began = time.perf_counter()
            scores = replay(folder / file, *arguments, horizons)
            mse = {expert: over_all(scores, "mse", expert) for expert in ("lstm", "last_value", "seasonal_naive")}
            mae = over_all(scores, "mae", "lstm")
            print(
                f"{name:<8}{horizons:>4}{mse['lstm']:>10.4f}{mae:>8.4f}{mse['last_value']:>12.4f}"
                f"{mse['seasonal_naive']:>10.4f}{1 - mse['lstm'] / mse['last_value']:>8.3f}"
                f"{time.perf_counter() - began:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
