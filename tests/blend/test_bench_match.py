import json

from rich.console import Console

from kvblend_rag.commands.bench_match import run, table


def test_the_benchmark_runs_and_prints():
    result = run(chunks=200, repeats=2)
    assert json.loads(json.dumps(result)) == result
    cases = list(result["cases"].values())
    assert [case["found"] for case in cases] == [24, 0, 24]
    assert [case["found_tokens"] for case in cases] == [24 * 254, 0, 24 * 254]
    assert all(case["median_ms"] <= case["p95_ms"] <= case["max_ms"] for case in cases)
    console = Console(width=120, record=True)
    console.print(table(result))
    assert "24 chunks present" in console.export_text()
