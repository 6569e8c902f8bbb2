"""
The scores of ``streamlstm replay --out``, recomputed from the Parquet file and the CSV by nothing of the project's.

The truth is looked up in the CSV by time, the last value there too; only the forecasts come from the Parquet file.

streamlstm replay -c config/etth2.yaml --from ETTh2.csv --rows 14400 --out forecasts.parquet
python bench/recompute.py forecasts.parquet ETTh2.csv --rows 14400 --standardise 2880 --score-from 3600
"""

import argparse
import csv
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq


def read_csv(path: str, rows: int | None, time_column: str, time_format: str):
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        records = [record for i, record in enumerate(reader) if rows is None or i < rows]
    columns = [name for name in records[0] if name != time_column]
    times = [datetime.strptime(r[time_column], time_format).replace(tzinfo=UTC) for r in records]
    time_s = np.array([int(t.timestamp()) for t in times])
    return time_s, {name: np.array([float(r[name]) for r in records]) for name in columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forecasts")
    parser.add_argument("csv")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--standardise", type=int)
    parser.add_argument("--score-from", type=int, default=0)
    parser.add_argument("--time-column", default="date")
    parser.add_argument("--time-format", default="%Y-%m-%d %H:%M:%S")
    args = parser.parse_args()

    time_s, truth = read_csv(args.csv, args.rows, args.time_column, args.time_format)
    row_at = {int(t): i for i, t in enumerate(time_s)}
    by_horizon: dict[int, np.ndarray] = {}  # pairs, Σe², Σ|e|, Σe² of the last value, Σ|e| of it
    file = pq.ParquetFile(args.forecasts)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["series_id", "cutoff", "ds", "horizon", "yhat"])
        table = table.filter(pc.field("ds").is_valid())
        name = np.array(table["series_id"].to_pylist())
        cutoff = table["cutoff"].to_numpy().astype("datetime64[s]").astype(np.int64)
        due = table["ds"].to_numpy().astype("datetime64[s]").astype(np.int64)
        horizon = table["horizon"].to_numpy()
        yhat = table["yhat"].to_numpy(zero_copy_only=False)
        origin = np.array([row_at[int(t)] for t in cutoff])
        target = np.array([row_at.get(int(t), -1) for t in due])
        counts = (target >= 0) & (origin >= args.score_from - 1) & ~np.isnan(yhat)
        for column, values in truth.items():
            mine = counts & (name == column)
            scale = values[: args.standardise].std() if args.standardise else 1.0
            error = (values[target[mine]] - yhat[mine]) / scale
            naive = (values[target[mine]] - values[origin[mine]]) / scale
            terms = np.stack([np.ones(len(error)), error**2, abs(error), naive**2, abs(naive)])
            for j in np.unique(horizon[mine]).tolist():
                sums = terms[:, horizon[mine] == j].sum(axis=1)
                by_horizon[j] = by_horizon.get(j, np.zeros(5)) + sums

    print(f"{'horizon':>7} {'pairs':>12} {'MSE':>11} {'MAE':>11} {'last MSE':>11} {'last MAE':>11} {'skill':>11}")
    for j in [*sorted(by_horizon), "all"]:
        n, square, absolute, naive_square, naive_absolute = sum(by_horizon.values()) if j == "all" else by_horizon[j]
        skill = 1 - square / naive_square
        values = [square / n, absolute / n, naive_square / n, naive_absolute / n]
        print(f"{j:>7} {n:>12,.0f} " + " ".join(f"{v:>11.4f}" for v in values) + f" {skill:>+11.3f}")


if __name__ == "__main__":
    main()
