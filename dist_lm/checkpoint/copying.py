"""A checkpoint from one store to another, such as a backup in object storage.

Enters: a checkpoint and a store.  Leaves: the same checkpoint there.  Promises: the copy was read
back and verified; a damaged original is not copied.
"""

from __future__ import annotations

import json
import uuid

from dist_lm.checkpoint.manifest import MANIFEST, Checkpoint, sealed
from dist_lm.checkpoint.store import Draft, Store
from dist_lm.errors import ConfigError, DataError


def copy_checkpoint(checkpoint: Checkpoint, to: Store) -> Checkpoint:
    """Raises ConfigError where the checkpoint is there already, DataError where a hash differs."""
    if checkpoint.name in to.names():
        raise ConfigError(f"{to.where(checkpoint.name)} exists already", do="Choose another place.")
    problem = checkpoint.damage(sorted(checkpoint.files))
    if problem:
        raise DataError(f"{checkpoint.folder} is damaged: {problem}", do="Copy another step with RUN@STEP.")
    draft = Draft(checkpoint.name, f"copy-{uuid.uuid4().hex[:8]}")
    # Stores name files differently; everything else in the manifest stays as it is.
    new_names = {file: to.file_in(draft, file.rpartition("/")[2]) for file in checkpoint.files}
    for file in checkpoint.files:
        to.write(draft, file.rpartition("/")[2], checkpoint.store.chunks(checkpoint.name, file))
    manifest = json.loads(checkpoint.store.read(checkpoint.name, MANIFEST))
    manifest["files"] = {new_names[file]: facts for file, facts in manifest["files"].items()}
    for parameter in manifest["parameters"].values():
        parameter["pieces"] = [[start, size, new_names[file]] for start, size, file in parameter["pieces"]]
    to.publish(draft, MANIFEST, sealed(manifest))
    copied = Checkpoint.read(to, checkpoint.name)
    problem = copied.damage(sorted(copied.files))
    if problem:
        to.set_aside(checkpoint.name, problem)
        raise DataError(f"the copy at {copied.folder} is damaged: {problem}", do="Run the same command again.")
    return copied
