"""What servers will not load is said before anything is trained."""

from fastjax.api.serving import serving_notes
from fastjax.config import LoRAConfig


def test_choices_that_servers_refuse_are_told() -> None:
    assert serving_notes(LoRAConfig(use_rslora=True)) == []
    dora, bias, rank = serving_notes(
        LoRAConfig(use_dora=True, lora_bias="all", lora_r=1024)
    )
    assert "DoRA" in dora
    assert "biases" in bias
    assert "1024" in rank


def test_tables_and_ranks_of_patterns() -> None:
    table, rank = serving_notes(
        LoRAConfig(modules_to_save=("lm_head",), rank_pattern=("q_proj=1024",))
    )
    assert "trained embeddings" in table
    assert "this is 1024" in rank
