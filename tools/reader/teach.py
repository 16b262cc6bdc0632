"""Teach the bundled reader to answer over blended chunks what it answers after a full prefill.

    python -m tools.reader.teach BASE READER DATA OUT [--seconds N] [--rate R]

BASE and READER are the prepared models (``kvblend_rag.demo.reader``), DATA the folder of question sets with ``val/``
in it, which is read only to leave its paragraphs out. The adapter goes on being trained from where it is; its teacher
is the reader as it was, after a full prefill. What is learnt from is the KL of the teacher's next-token distributions
at the answer's tokens to the student's: over blended chunks and, so that nothing is forgotten, after a full prefill.
Block-Attention (arXiv:2409.15355) and TurboRAG (arXiv:2410.07590) fine-tune for chunks that were computed alone; here
a chunk stands behind kvblend's ingest context, and some of its tokens are recomputed as a request does.

OUT receives ``adapter.safetensors``, ``adapter.json`` and ``log.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from kvblend_rag.blend.context import ingest_context
from kvblend_rag.demo.prompt import SYSTEM_PROMPT
from kvblend_rag.demo.reader import ADAPTER
from tools.reader.batch import Prompt, blended_batch, full_batch, recomputed
from tools.reader.examples import Example, Paragraphs, from_text, mixed, two_documents
from tools.reader.prompts import Prompts, batches
from tools.reader.student import Student
from tools.reader.writer import Writer, written_examples

WAYS = (
    (0.4, "none", (0.0, 0.0)),
    (0.3, "evidence", (0.1, 0.3)),
    (0.2, "spans", (0.1, 0.3)),
    (0.1, "first", (0.1, 0.2)),
)
"""How often, which tokens, and which share of them is recomputed."""

WARM_UP = 20
"""Steps over which the learning rate rises."""

CHECKS = 3
CHECKED_AT = 0.15
"""Share recomputed where it is looked how far the student is."""

_Source = tuple[float, Callable[[random.Random], Example | None]]


def divergence(teacher: Tensor, student: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """KL at the answers' tokens.

    Args:
        teacher: log-probabilities, (tokens of all answers, vocabulary).
        student: logits, the same.
        lengths: of the answers.

    Returns:
        What is learnt from, in which a long answer counts as its length's root; and the mean of each answer.
    """
    at = F.kl_div(student.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
    counts = torch.tensor(lengths, device=at.device)
    weights = (counts**-0.5).repeat_interleave(counts, output_size=len(at))
    rows = torch.arange(len(lengths), device=at.device).repeat_interleave(counts, output_size=len(at))
    means = torch.zeros(len(lengths), device=at.device).index_add_(0, rows, at.detach()) / counts
    return (at * weights).sum() / len(lengths), means


@torch.no_grad()
def checked(
    student: Student, teacher: dict[str, Tensor], prompts: list[Prompt], context: list[int]
) -> dict[str, float]:
    """Mean KL per answer on prompts that nothing is learnt from: after a full prefill, and blended in three ways."""
    found: dict[str, list[float]] = {"full": [], "none": [], "evidence": [], "spans": []}
    mine = student.projections()
    for at in range(0, len(prompts), 8):
        batch = prompts[at : at + 8]
        lengths = [len(prompt.answer) for prompt in batch]
        ids, wanted = full_batch(batch, student.device)
        truth = student.llama.full(teacher, ids, wanted).log_softmax(-1)
        found["full"] += divergence(truth, student.llama.full(mine, ids, wanted), lengths)[1].tolist()
        for way in ("none", "evidence", "spans"):
            flags = [recomputed(each, CHECKED_AT * (way != "none"), way, random.Random(0)) for each in batch]
            made = blended_batch(batch, flags, context, student.device, student.dtype)
            found[way] += divergence(truth, student.llama.blended(mine, made), lengths)[1].tolist()
    return {way: round(sum(values) / len(values), 4) for way, values in found.items()}


def learnt(
    student: Student, teacher: dict[str, Tensor], batch: list[Prompt], context: list[int], draw: random.Random
) -> tuple[str, Tensor, Tensor]:
    """Gradients of one step: which tokens were recomputed, and the two losses, blended and after a full prefill."""
    lengths = [len(prompt.answer) for prompt in batch]
    ids, wanted = full_batch(batch, student.device)
    with torch.no_grad():
        truth = student.llama.full(teacher, ids, wanted).log_softmax(-1)
    ((_, way, ratios),) = draw.choices(WAYS, [weight for weight, *_ in WAYS])
    flags = [recomputed(prompt, draw.uniform(*ratios), way, draw) for prompt in batch]
    made = blended_batch(batch, flags, context, student.device, student.dtype)
    blended, _ = divergence(truth, student.llama.blended(student.projections(), made), lengths)
    blended.backward()
    # Half of the batch is enough to hold it where it is, and costs half.
    half = len(batch) // 2
    there = sum(lengths[:half])
    full, _ = divergence(
        truth[:there], student.llama.full(student.projections(), ids[:half], wanted[:there]), lengths[:half]
    )
    full.backward()
    return way, blended.detach(), full.detach()


def sources(paragraphs: Paragraphs, human: list[Example], written: list[Example]) -> list[_Source]:
    """Where examples come from, and how often."""
    about = paragraphs.about()

    def over_two(draw: random.Random) -> Example:
        (first, beside), (second, _) = draw.sample(about, 2)
        return two_documents(first["text"], second["text"], beside, draw)

    return [
        (0.35, lambda draw: draw.choice(human)),
        (0.4, lambda draw: draw.choice(written)),
        (0.15, lambda draw: from_text(*draw.choice(about), draw)),
        (0.1, over_two),
    ]


def main() -> None:  # noqa: D103
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("base", "reader", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seconds", type=float, default=420.0, help="to learn for, after the questions are written")
    parser.add_argument("--rate", type=float, default=1.5e-4, help="the highest learning rate")
    parser.add_argument("--questions", type=int, default=5000, help="paragraphs to write a question over")
    parser.add_argument("--held-out", type=int, default=64, help="people's questions to check on and not to learn from")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = AutoTokenizer.from_pretrained(given.reader, padding_side="left")
    paragraphs = Paragraphs(given.data)
    human = paragraphs.human()
    random.Random(0).shuffle(human)
    held, human = human[: given.held_out], human[given.held_out :]
    writer, reader = (Writer(folder, tokenizer, given.device) for folder in (given.base, given.reader))
    written = written_examples(paragraphs, writer, reader, random.Random(1), given.questions)
    del writer, reader
    print(f"{len(human)} people's questions and {len(written)} written ones, as:", flush=True)
    for example in written[:8]:
        print(f"  {example.question} | {example.answer}")

    prompts = Prompts(tokenizer)
    draw = random.Random(2)
    held_prompts = [made for example in held if (made := prompts.made(example, 8, draw))]
    usual = ingest_context("long", tokenizer, SYSTEM_PROMPT)
    others = ingest_context("long", tokenizer), ingest_context("document", tokenizer, SYSTEM_PROMPT)
    student = Student(given.base, ADAPTER, given.device)
    with torch.no_grad():
        teacher = student.projections()
    factors = list(student.factors.values())
    optimizer = torch.optim.AdamW(factors, lr=given.rate, betas=(0.9, 0.98), weight_decay=0.0)
    log: dict[str, Any] = {"checks": [], "steps": []}

    def check(step: int) -> None:
        log["checks"].append({"step": step, **checked(student, teacher, held_prompts, usual)})
        print(log["checks"][-1], flush=True)

    check(0)
    began, tokens, step = time.monotonic(), 0, 0
    for batch in batches(mixed(sources(paragraphs, human, written), draw), prompts, draw):
        spent = time.monotonic() - began
        if spent >= given.seconds:
            break
        if spent >= given.seconds * len(log["checks"]) / CHECKS:
            check(step)
            student.save(given.out)
        rate = given.rate * min((step + 1) / WARM_UP, 1.0) * (1 - spent / given.seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        way, blended, full = learnt(student, teacher, batch, draw.choice((usual, usual, *others)), draw)
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += sum(len(prompt.ids()) for prompt in batch)
        if step % 20 == 0:
            values = {"blended": round(blended.item(), 4), "full": round(full.item(), 4)}
            log["steps"].append({"step": step, "way": way, **values, "tokens": tokens, "seconds": round(spent, 1)})
            print(log["steps"][-1], flush=True)
        step += 1
    check(step)
    taught = {"learning_rate": given.rate, "seconds": given.seconds, "steps": step, "prompt_tokens": tokens}
    student.save(given.out, blended=taught)
    (given.out / "log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
