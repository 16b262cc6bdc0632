"""``kvblend plan-capacity``: sizes, costs and break-even bandwidths, from the user's numbers. No engine is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from kvblend_rag.commands import terminal
from kvblend_rag.commands.capacity import MODELS, TERAFLOPS, Plan, Tier, find_shape, with_prices
from kvblend_rag.errors import ConfigError

_GIB = 1 << 30


def run(
    *,
    model: str = "Llama-3.1-8B",
    tokens: float = 1e6,
    bytes_per_value: float = 2.0,
    prefill_rate: float | None = None,
    teraflops: float = TERAFLOPS,
    ratio: float = 0.15,
    machine_hour: float = 3.0,
    price: Sequence[str] = (),
    bandwidth: Sequence[str] = (),
    json: str | None = None,
) -> int:
    """Print what KV takes by model, and what keeping the chosen model's costs and gains by tier.

    Raises:
        ConfigError: an unknown model or tier, or a number that can't be used.
    """
    for name, value in (
        ("--tokens", tokens),
        ("--bytes-per-value", bytes_per_value),
        ("--prefill-rate", 1.0 if prefill_rate is None else prefill_rate),
        ("--teraflops", teraflops),
        ("--machine-hour", machine_hour),
    ):
        if not 0 < value < 1e18:
            raise ConfigError(f"{name} is {value:g}, and must be above 0.")
    if not 0 <= ratio < 1:
        raise ConfigError(f"--ratio is {ratio:g}, and must be at least 0 and below 1.")
    shape = find_shape(model)
    rate = shape.prefill_rate(teraflops) if prefill_rate is None else prefill_rate
    plan = Plan(shape, rate, tokens, bytes_per_value, ratio, machine_hour)
    tiers = with_prices(_numbers(price), _numbers(bandwidth))
    console = terminal.prose(json)
    console.print(_sizes(bytes_per_value))
    console.print(_costs(model, plan, tiers))
    console.print(
        f"Loading beats a prefill of {rate:,.0f} tokens/s from {plan.break_even():,.2f} GB/s on. Prices and "
        "bandwidths are round figures unless you gave your own; measure your prefill rate with `kvblend bench ttft`."
    )
    terminal.write_json(as_dict(model, plan, tiers), json)
    return 0


def as_dict(model: str, plan: Plan, tiers: dict[str, Tier]) -> dict[str, Any]:
    """All of it, JSON-able."""
    return {
        "model": model,
        "prefill_tokens_per_second": plan.prefill_rate,
        "bytes_per_token": plan.token_bytes(),
        "gib": plan.token_bytes() * plan.tokens / _GIB,
        "break_even_gb_per_second": plan.break_even(),
        "prefill_dollars_a_million": plan.prefill_dollars(),
        "tiers": {name: plan.tier(tier) for name, tier in tiers.items()},
        "models": {name: shape.bytes_per_token(plan.bytes_per_value) for name, shape in MODELS.items()},
    }


def _sizes(bytes_per_value: float) -> Table:
    table = Table("model", "KV a token", "a million tokens", title=f"{bytes_per_value:g} bytes a value")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, shape in sorted(MODELS.items(), key=lambda item: item[1].bytes_per_token()):
        token = shape.bytes_per_token(bytes_per_value)
        table.add_row(name, f"{token / 1024:g} KiB", f"{token * 1e6 / _GIB:,.1f} GiB")
    return table


def _costs(model: str, plan: Plan, tiers: dict[str, Tier]) -> Table:
    size = plan.token_bytes() * plan.tokens / _GIB
    title = f"{model}: {plan.tokens:,.0f} tokens are {size:,.1f} GiB; a prefill of a million costs "
    table = Table(
        "tier", "GB/s", "$ a GB-month", "$ a million tokens", "$ a month", "speed-up", "pays from, uses a month",
        title=f"{title}${plan.prefill_dollars():,.3f}",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tier in tiers.items():
        row = plan.tier(tier)
        table.add_row(
            name,
            f"{tier.gigabytes_per_second:g}",
            f"{tier.dollars:g}",
            f"{row['dollars_a_million']:,.2f}",
            f"{row['dollars']:,.2f}",
            f"{row['speedup']:.1f}×",
            f"{row['uses']:,.1f}",
        )
    return table


def _numbers(given: Sequence[str]) -> dict[str, float]:
    numbers = {}
    for each in given:
        name, separator, value = each.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise ConfigError(f"{each!r} can't be used: write TIER=NUMBER, as disk=0.1.")
    return numbers


__all__ = ["as_dict", "run"]
