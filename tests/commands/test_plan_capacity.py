import json

import pytest

from kvblend_rag.cli import main
from kvblend_rag.commands.capacity import MODELS, TIERS, ModelShape, Plan, Tier, find_shape


def test_known_sizes():
    """From the models' cards: KiB a token in bfloat16."""
    known = {"Qwen2.5-7B": 56, "Llama-3.1-8B": 128, "Mistral-7B-v0.3": 128, "Qwen3-8B": 144, "Llama-3.1-70B": 320}
    assert {name: MODELS[name].bytes_per_token() / 1024 for name in known} == known
    assert len(MODELS) > 10


def test_the_formula_by_hand():
    plan = Plan(ModelShape(1, 1, 500, 2), 1_000, bytes_per_value=1, ratio=0.5, machine_hour=3.6)
    assert plan.token_bytes() == 1_000
    assert plan.break_even() == pytest.approx(0.002)
    assert plan.prefill_dollars() == pytest.approx(1.0)
    row = plan.tier(Tier(dollars=2.0, gigabytes_per_second=0.004))
    assert row["dollars_a_million"] == pytest.approx(2.0)
    assert row["speedup"] == pytest.approx(1e-3 / (0.25e-3 + 0.5e-3))
    assert row["uses"] == pytest.approx(4.0)
    assert plan.shape.prefill_rate(teraflops=400) == pytest.approx(1e5)


@pytest.mark.parametrize("tier", TIERS.values())
def test_at_the_break_even_bandwidth_nothing_is_gained(tier):
    plan = Plan(MODELS["Llama-3.1-8B"], 20_000, ratio=0.2)
    assert plan.tier(Tier(tier.dollars, plan.break_even()))["speedup"] == pytest.approx(1.0)


def test_a_folder_is_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096})
    )
    assert find_shape(str(tmp_path)).bytes_per_token() == 128 * 1024
    assert main(["plan-capacity", "--model", str(tmp_path)]) == 2
    assert "--prefill-rate" in capsys.readouterr().err
    assert main(["plan-capacity", "--model", str(tmp_path), "--prefill-rate", "5000"]) == 0


def test_the_command(capsys):
    given = ["--model", "qwen2.5-7b", "--tokens", "2e6", "--price", "disk=0.5", "--bandwidth", "s3=3", "--json"]
    assert main(["plan-capacity", *given]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes_per_token"] == 56 * 1024
    assert result["tiers"]["disk"]["dollars"] == pytest.approx(56 * 1024 * 2e6 / 1e9 * 0.5)
    assert main(["plan-capacity"]) == 0
    shown = capsys.readouterr().out
    assert "Llama-3.1-70B" in shown
    assert "GB/s" in shown


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--model", "nosuch"], "config.json"),
        (["--price", "tape=1"], "tape"),
        (["--price", "disk"], "TIER=NUMBER"),
        (["--bandwidth", "disk=0"], "above 0"),
        (["--ratio", "1"], "--ratio"),
        (["--tokens", "nan"], "--tokens"),
    ],
)
def test_numbers_that_make_no_sense(given, says, capsys):
    assert main(["plan-capacity", *given]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[]", "junk", '{"num_attention_heads": 0, "num_hidden_layers": 1}'])
def test_configurations_without_sizes(tmp_path, content):
    from kvblend_rag.errors import ConfigError

    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="does not say"):
        find_shape(str(tmp_path))
