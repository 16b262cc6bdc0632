"""``kvblend ingest --ray`` with a real engine in a real Ray actor; what it stored is blended by another engine."""

import json
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import yaml

from kvblend_rag.cli import main
from kvblend_rag.quality.forcing import engine_arguments

pytestmark = pytest.mark.full

TEXT = "The ferry number {} leaves the northern pier at six in the morning and comes back in the evening. "


def test_a_data_set_is_stored_by_a_vllm_engine_and_blended_by_another(rigs, tmp_path, capsys, monkeypatch):
    rigs.close()
    mark = uuid.uuid4().hex
    monkeypatch.setenv("OF_THIS_RUN", mark)
    store, file = str(tmp_path / "store"), tmp_path / "feed.jsonl"
    rows = [{"id": f"d{number}", "text": TEXT.format(number) * 2} for number in range(6)]
    file.write_text("\n".join([*map(json.dumps, rows), '{"id": "short", "text": "Too short."}']))
    arguments = {"enforce_eager": True, "dtype": "float32", "max_model_len": 1536, "kv_cache_memory_bytes": 1 << 28}
    config = tmp_path / "kv_blend.yaml"
    config.write_text(
        yaml.safe_dump(
            {"store_path": store, "ingest_context": "document", "engine_args": {**arguments, **engine_arguments()}}
        )
    )
    call = ["ingest", "--ray", str(file), "--model", str(rigs.model("llama")), "--config", str(config), "--batch", "4"]
    assert main(call) == 1  # one row failed
    assert left_over(mark) == []
    shown = capsys.readouterr()
    assert "6 documents stored (6 chunks computed" in shown.out
    assert "1 rows failed" in shown.err.replace("\n", " ")
    (letter,) = map(json.loads, (tmp_path / "store" / "ingest" / "dead-letters.jsonl").read_text().splitlines())
    assert (letter["id"], letter["source"]) == ("short", f"{file}:7")

    rig = rigs.get("llama", store_path=store, system_prompt=_system_prompt())
    assert rig.llm.kvblend.ingest([row["text"] for row in rows], progress=False).computed == 0
    encode = rig.engine.tokenizer.encode
    body = [encode(rows[number]["text"], add_special_tokens=False) for number in (3, 1)]
    prompt = np.concatenate([rig.tokens(20, 1), body[0], rig.tokens(5, 2), body[1], rig.tokens(30, 3)]).astype(np.int32)
    (answer,) = rig.fresh([prompt], selector="everything")
    assert answer.report.blended
    assert answer.report.recomputed_tokens == sum(map(len, body))
    assert answer.difference(rig.plain(prompt)) < 1e-4


def left_over(mark, seconds=30):
    """Processes of the run that have not ended: Ray's, and vLLM's below it."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                inherited = mark.encode() in (folder / "environ").read_bytes()
                if inherited and int(folder.name) != os.getpid():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # ended, or not ours
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _system_prompt():
    from kvblend_rag.demo.prompt import SYSTEM_PROMPT

    return SYSTEM_PROMPT
