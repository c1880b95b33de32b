"""The driver of a run on a Ray cluster:

ray job submit --working-dir . -- python launch/on_ray.py -c launch/recipes/X.yaml run.dir=/shared/runs/x
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_lm.cli import main

if __name__ == "__main__":
    main(["train", "--ray", *sys.argv[1:]])
