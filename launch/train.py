"""One rank under `deepspeed`, `torchrun` or `srun`:

deepspeed --num_gpus 8 launch/train.py -c launch/recipes/X.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_lm.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
