"""What would make a run fit: one change where one is enough, else by how much it is too large, and for what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dist_lm.errors import ConfigError
from dist_lm.plan.fitting import Need, options

pytestmark = pytest.mark.fast


def shared(states: float, rest: float) -> Callable[[int], float]:
    """States are divided among the ranks, the rest is not."""
    return lambda ranks: rest + states / ranks


def need(states: float, rest: float, **fields: Any) -> Need:
    """On one device of 20 GiB, of which 18 may be filled; 4 GiB of activations of 8 rows."""
    total_on = shared(states, rest)
    common = {"rows": 8, "activations": 4.0, "recomputed": None, "optimizer": 0.0, **fields}
    return Need(total=total_on(1), there=20.0, ranks=1, total_on=total_on, **common)


def test_a_smaller_micro_batch_fits() -> None:
    # 19 GiB, half a GiB a row.
    assert options(need(10.0, 9.0)) == ["zero=3 batch.micro=6"]


def test_each_single_option_is_named() -> None:
    found = options(need(16.0, 8.0, rows=1, recomputed=0.5, optimizer=10.0))
    assert found == ["zero=3 deepspeed=ds_configs/zero3_offload.json (10.0 GiB to the host)"]
    found = options(need(12.0, 8.0, rows=1, recomputed=1.5))
    assert found == ["zero=3 model.activation_checkpointing=true (2.5 GiB less)"]


def test_where_none_fits_it_is_told_by_how_much_and_how_many_or_which_devices_would() -> None:
    with pytest.raises(ConfigError, match="the model fits by no option") as caught:
        options(need(80.0, 8.0))
    assert "needs 88.0 GiB a rank: 70.0 GiB more than 90% of the 20.0 GiB that are there" in str(caught.value)
    # 8 + 80 / 8 = 18; and 88 / 0.9 = 97.8.
    assert "Take 8 devices of this kind at zero=3 or as many of 98 GiB or more (h200: 140.4)" in str(caught.value)


def test_what_no_device_has_is_not_promised() -> None:
    with pytest.raises(ConfigError) as caught:
        options(need(900.0, 30.0))
    assert "devices of this kind" not in str(caught.value)
    assert "Take shorter rows, a smaller model, LoRA" in str(caught.value)
