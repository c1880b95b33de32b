"""What the scaling model of `dist-lm plan` says of runs whose throughput others published.

    python bench/published.py [--out bench/results/published.md]

Enters: nothing; it computes.  Leaves: a table, with errors.  dist_lm/plan/published.py has the sources.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.recorded import record
from dist_lm.plan.published import comparisons, root_mean_square
from dist_lm.plan.traffic import LATENCY_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    found = comparisons()
    lines = ["| run | GPUs | published | predicted | error | |", "|---|---|---|---|---|---|"]
    for each in found:
        lines.append(
            f"| {each.series} | {each.fewest} to {each.gpus} | {each.published:.3f} | {each.predicted:.3f} "
            f"| {each.error:+.1%} | {'fitted' if each.fitted else 'not fitted'} |"
        )
    errors = {
        "rms_fitted": root_mean_square([each for each in found if each.fitted]),
        "rms_not_fitted": root_mean_square([each for each in found if not each.fitted]),
    }
    lines.append(
        f"\nRoot mean square error {errors['rms_fitted']:.1%} of the points that LATENCY_S ({LATENCY_S:.1e} s) was "
        f"fitted to, {errors['rms_not_fitted']:.1%} of the others."
    )
    record(
        "Tokens a second and GPU, as a share of those on the fewest GPUs",
        "\n".join(lines),
        {"points": [{**asdict(each), "error": each.error} for each in found], **errors},
        out,
    )


if __name__ == "__main__":
    main()
