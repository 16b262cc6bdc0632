"""Every reason on the troubleshooting page has a kind, and the kinds are few."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvblend_rag.blend.cause import CAUSES, cause_of

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^#+ (.+?)\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def reasons(section: str) -> list[str]:
    found = re.findall(r"^\| (`+)(.+?)\1 \|", SECTIONS[section], re.MULTILINE)
    return [text.strip() for _, text in found if text not in ("report.reason", "reason")]


REASONS = [
    *reasons("The store and the prompt"),
    *reasons("The request"),
    *reasons("Something was matched and then computed after all"),
]


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_has_a_kind(reason: str) -> None:
    assert cause_of(reason) in set(CAUSES) - {"other"}, reason


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("this model can't be blended: LoRA is enabled", "model"),
        ("calibration refused this model: it loses 0.3 nats", "verdict"),
        ("none of the 12 stored chunks stands in the prompt", "absent"),
        ("the store holds no chunks for this model and ingest context", "empty"),
        ("Chunk abc is not in the store: ingest its text again.", "missing"),
        ("/s/chunks/ab.safetensors fails its checksum: ingest the chunk's text again.", "damaged"),
        ("redis://h:1 did not answer within 2 s: check the server, or raise timeout_s.", "unreachable"),
        ("recompute_ratio among the arguments is '1', and must be a number.", "options"),
        ("the prompt was in vLLM's own prefix cache", "cached"),
        ("something new", "other"),
    ],
)
def test_kinds(reason: str, kind: str) -> None:
    assert cause_of(reason) == kind


def test_labels_are_bounded() -> None:
    assert len(REASONS) > 25
    assert len(set(CAUSES)) == len(CAUSES) < 25
    assert all(re.fullmatch("[a-z]+", each) for each in CAUSES)
