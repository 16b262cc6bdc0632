"""Every reason and refusal in the code is listed in docs/troubleshooting.md, and none that is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kvblend_rag"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
LISTED = [
    found["text"].strip()
    for found in re.finditer(r"^\| (?P<mark>`+)(?P<text>.+?)(?P=mark) \|", PAGE, re.MULTILINE)
    if found["text"] not in ("report.reason", "reason")
]


def text_of(node: ast.AST) -> str | None:
    """A literal's text, with an ellipsis for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{text_of(node.left) or '…'}{text_of(node.right) or '…'}"
    return None


def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def function(file: str, name: str) -> ast.FunctionDef:
    (found,) = (n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef) and n.name == name)
    return found


def conditions(file: str, name: str) -> Iterator[str]:
    """The second members of a table of (applies, reason)."""
    for node in ast.walk(function(file, name)):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and (text := text_of(node.elts[1])):
            yield text


def raised(file: str, *kinds: str) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds and call.args:
            text = text_of(call.args[0])
            if text and text.strip("…"):
                yield text


def returned(file: str, *names: str) -> Iterator[str]:
    for name in names:
        for node in ast.walk(function(file, name)):
            if isinstance(node, ast.Return) and node.value is not None:
                values = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
                yield from filter(None, map(text_of, values))


def constants(file: str, *names: str) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            text = text_of(node.value)
            assert text is not None
            yield text


def damages() -> Iterator[str]:
    for node in ast.walk(tree("store/chunk_file.py")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_damaged":
            yield f"… {text_of(node.args[1])}: ingest the chunk's text again."


def assigned(file: str) -> Iterator[str]:
    """What is set as a reason or a refusal in passing."""
    for node in ast.walk(tree(file)):
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Attribute) and "refusal" in target.attr and node.value is not None:
            yield from filter(None, [text_of(node.value)])
        if isinstance(node, ast.keyword) and node.arg in ("reason", "fallback"):
            parts = [node.value, *(node.value.values if isinstance(node.value, ast.BoolOp) else ())]
            yield from filter(None, map(text_of, parts))


REASONS = {
    "gate": [*conditions("blend/gate.py", "refusal")],
    "survey": [
        *conditions("vllm_plugin/worker/survey.py", "refuse_options"),
        *raised("vllm_plugin/worker/survey.py", "Refused"),
        *raised("vllm_plugin/worker/rotary.py", "NoShift"),
    ],
    "worker": [
        *raised("vllm_plugin/worker/worker_side.py", "Refused"),
        *returned("vllm_plugin/versions.py", "unsupported_version"),
    ],
    "identity": [*raised("vllm_plugin/worker/identity.py", "ValueError")],
    "scheduler": [
        *returned("vllm_plugin/scheduler/scheduler_side.py", "_plan_saving", "_nothing_matched"),
        *assigned("vllm_plugin/scheduler/scheduler_side.py"),
        *constants("report.py", "SAME_BLEND"),
        *constants("ingest.py", "STORING"),
    ],
    "planner": [
        *returned("blend/choice.py", "reason", "hopeless"),
        *returned("vllm_plugin/scheduler/crowd.py", "too_large"),
        *returned("vllm_plugin/scheduler/scheduler_side.py", "_wait_for_chunks"),
    ],
    "request": [*raised("vllm_plugin/request.py", "ConfigError")],
    "blender": [
        *raised("vllm_plugin/worker/blender.py", "ChunkDamaged"),
        *assigned("vllm_plugin/worker/blender.py"),
        *damages(),
    ],
    "guard": [*assigned("guard.py")],
    "verdict": [*raised("calibration/verdict.py", "ConfigError")],
    "missing": [*raised("store/chunk_file.py", "ChunkMissing")],
    "documents": [
        *constants("document_use.py", "NOT_INGESTED", "TOO_SHORT", "CUT", "ESCAPED", "ABSENT", "CACHED", "OTHER")
    ],
    "ingest": [*raised("ingest.py", "ChunkRejected")],
    "remote": [
        *raised("store/remote.py", "StoreFull", "StoreUnreachable", "ChunkMissing"),
        *raised("store/valkey.py", "StoreFull", "StoreUnreachable"),
        *raised("store/s3.py", "StoreUnreachable"),
    ],
    "disk": [*raised("store/disk.py", "StoreFull"), *raised("store/listing.py", "StoreFull")],
    "launch": [
        *raised("vllm_plugin/launch.py", "ConfigError", "ModelNotFound", "EngineUnavailable"),
        *raised("vllm_plugin/engine.py", "ConfigError", "EngineUnavailable"),
        *raised("vllm_plugin/expected.py", "EngineUnavailable"),
    ],
    "serve": [
        *raised("vllm_plugin/serve.py", "ConfigError", "EngineUnavailable"),
        *raised("commands/serve.py", "ConfigError"),
        *raised("serving/jobs.py", "QueueFull"),
    ],
    "client": [
        *raised("client/connection.py", "ConfigError", "NotServed", "EngineUnavailable", "RequestTimeout"),
        *raised("client/engine.py", "ConfigError"),
        *constants("client/connection.py", "CLIENT_MISSING"),
    ],
}
NOT_FOR_USERS = {"vLLM does not accept the request: …"}


def same(reason: str, listed: str) -> bool:
    """Whether a line of the page stands for a reason; an ellipsis on either side stands for anything."""
    one, other = (re.sub("…+", "…", text.replace("`", "").strip().rstrip(".")) for text in (reason, listed))
    return any(
        re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), text, re.DOTALL)
        for pattern, text in ((other, one), (one, other))
        if sum(map(str.isalpha, pattern)) >= 8
    )


@pytest.mark.parametrize(("where", "reason"), [(where, each) for where, found in REASONS.items() for each in found])
def test_reason_is_explained(where: str, reason: str) -> None:
    if reason in NOT_FOR_USERS:
        pytest.skip("not a reason of ours")
    assert any(same(reason, listed) for listed in LISTED), reason


def test_reasons_were_found_at_all() -> None:
    assert all(REASONS.values())
    assert sum(map(len, REASONS.values())) > 60


def test_no_reason_is_listed_that_is_gone() -> None:
    """Texts on the page that say why nothing was blended are still in the code."""
    texts = {
        text
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (text := text_of(node)) and len(text) > 8
    } | set(damages())
    code = " ".join(text.replace("`", "") for text in texts)
    gone = []
    for listed in LISTED:
        longest = max(listed.replace("`", "").split("…"), key=len).strip(" .:;,()")
        if longest not in code and not any(same(text, listed) for text in texts):
            gone.append(listed)
    assert not gone
