"""Which ranks share rows, what part each has, and what is refused before anything is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.config_files import load_config
from dist_lm.errors import ConfigError
from dist_lm.mesh import Mesh, check_heads
from dist_lm.sequence_parallel import part_of, share_rows
from dist_lm.tasks.base import MicroBatch
from tests.config_text import BASE, refusal, write

pytestmark = pytest.mark.fast
CAUSAL = ("task={name: causal_lm}", "sequence_parallel_size=2")


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write("a.yaml", BASE)


def test_neighbours_share_rows() -> None:
    places = [Mesh.of(rank, 6, 2) for rank in range(6)]
    assert [(place.data_rank, place.part) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {(place.data_world_size, place.parts) for place in places} == {(3, 2)}
    assert Mesh.of(5, 6, 1) == Mesh(5, 6, 0, 1)


def whole_batch(positions: torch.Tensor | None) -> MicroBatch:
    """Two rows of seven places, the second with two documents."""
    ids = torch.arange(14).view(2, 7)
    places = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 10, 11, 12])
    inputs = {"input_ids": ids, "target_places": places, "target_labels": ids.view(-1)[places + 1]}
    return MicroBatch(inputs | ({} if positions is None else {"position_ids": positions}), {"lm": 11}, 13, 14)


def test_parts_hold_every_place_target_and_token_once() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
    whole = whole_batch(positions)
    parts = [part_of(whole, Mesh(0, 1, part, 3)) for part in range(3)]
    joined = {name: torch.cat([part.inputs[name] for part in parts], dim=1) for name in ("input_ids", "position_ids")}
    # Seven places are filled up to nine.
    assert torch.equal(joined["input_ids"][:, :7], whole.inputs["input_ids"])
    assert torch.equal(joined["position_ids"][:, :7], positions)
    assert all(torch.equal(part.inputs["row_positions"][:, :7], positions) for part in parts)
    found = {
        (int(part.inputs["input_ids"].view(-1)[place]), int(label))
        for part in parts
        for place, label in zip(part.inputs["target_places"], part.inputs["target_labels"], strict=True)
    }
    # The label of the last place of a part is the first token of the next part.
    assert found == {(int(place), int(place) + 1) for place in whole.inputs["target_places"]}
    assert [sum(part.targets["lm"] for part in parts), sum(part.tokens for part in parts)] == [11, 13]
    assert {part.slots for part in parts} == {6}


def test_rows_of_one_document_take_no_mask_and_know_where_they_begin() -> None:
    part = part_of(whole_batch(None), Mesh(0, 1, 1, 2))
    assert "row_positions" not in part.inputs
    assert part.inputs["position_ids"].tolist() == [[4, 5, 6, 0]] * 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sequence_parallel_size=2"], "has no meaning for mlm: it is for causal_lm and instruction"),
        ([*CAUSAL, "model={family: bert}"], "is for the families gpt2 and llama, not bert"),
        ([*CAUSAL, "model={attention: eager}"], "needs model.attention auto or sdpa"),
        ([*CAUSAL, "ray.workers={min: 2, max: 4}"], "needs a fixed number of ray.workers that it divides"),
        ([*CAUSAL, "ray.workers=3"], "needs a fixed number of ray.workers that it divides"),
        ([CAUSAL[0], "sp_size=2"], "did you mean `sequence_parallel_size`"),
    ],
)
def test_a_configuration_in_which_no_row_can_be_shared(recipe: str, overrides: list[str], words: str) -> None:
    assert words in refusal(recipe, *overrides)


def checked(recipe: str, *words: str) -> str:
    done = CliRunner().invoke(app, ["config", "check", "-c", recipe, *CAUSAL, *words])
    return f"{done.output}{done.exception or ''}"


def test_config_check_counts_groups_of_ranks(recipe: str) -> None:
    assert "2 ranks x 4 micro-steps x 16 rows" in checked(recipe)
    assert "8 ranks x 1 micro-steps x 16 rows" in checked(recipe, "--ranks", "8")
    assert "sequence_parallel_size 2 does not divide 3 ranks" in checked(recipe, "--ranks", "3")
    assert "does not divide the model's 4 attention heads" in checked(recipe, "sequence_parallel_size=3")
    llama = ["model={family: llama, size: base}", "sequence_parallel_size=9"]
    assert "does not divide the model's 3 heads of keys and values" in checked(recipe, *llama)


def test_heads_that_only_a_model_tells_are_checked_later(recipe: str) -> None:
    loaded = load_config(Path(recipe), ["task={name: causal_lm}", "sequence_parallel_size=3", "model.from=somewhere"])
    check_heads(loaded.config)
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type="gpt2", num_attention_heads=4))
    with pytest.raises(ConfigError, match="does not divide the model's 4 attention heads"):
        share_rows(model, Mesh(parts=3))


def test_a_model_whose_attention_nobody_has_compared_is_refused() -> None:
    config = OPTConfig(hidden_size=8, word_embed_proj_dim=8, num_attention_heads=2, num_hidden_layers=1, ffn_dim=8)
    opt = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="OPTForCausalLM cannot share its rows among ranks"):
        share_rows(opt, Mesh(parts=2))
