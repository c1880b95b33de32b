"""Every byte of a data set against its manifest.

Enters: the location of a data set.  Leaves: its manifest, or a DataError that names what is wrong.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from dist_lm.data.cache import ShardCache
from dist_lm.data.manifest import Manifest
from dist_lm.data.shards import ShardReader


def verify_dataset(location: str | Path) -> Manifest:
    """Read every byte of a data set; a DataError names the first shard and block that is wrong.

    Remote shards are copied to the temporary folder, one after the other, to compare their SHA-256.
    """
    manifest = Manifest.load(location)
    with tempfile.TemporaryDirectory(prefix="dist_lm-verify-") as folder:
        cache = ShardCache(Path(folder), max((entry.bytes for entry in manifest.shards), default=0))
        reader = ShardReader(location, manifest, verify=True, cache=cache)
        for shard, entry in enumerate(manifest.shards):
            for _ in reader.blocks(shard, 0, entry.blocks):
                pass
    return manifest
