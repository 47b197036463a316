"""FedAvg with many rounds on the phantoms: data/results/fedavg_long.csv, which lesson 04 draws.

Run it from the project's folder: python data/long_fedavg.py (five minutes on two cores; it goes on where it stopped).
"""

from pathlib import Path

import pandas as pd

from fedssg_helpers import metrics, runs

ROUNDS, SEEDS = 600, 3


def main() -> None:
    jobs = [runs.Job("fedavg", seed, ROUNDS) for seed in range(SEEDS)]
    rows = [
        ("phantom", "ten_hospitals", "fedavg", job.seed, r, metrics.balanced_accuracy(confusions.sum(0)))
        for job, run in zip(jobs, runs.run_many(jobs, workers=2))
        for r, confusions in zip(run.rounds, run.confusions)
    ]
    table = pd.DataFrame(rows, columns=["dataset", "setting", "method", "seed", "round", "balanced_accuracy"])
    file = Path(__file__).parent / "results" / "fedavg_long.csv"
    table.to_csv(file, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
