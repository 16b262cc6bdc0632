"""Teaching the reader: the same mathematics as the engine's, and what must not be learnt from."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tools.reader.batch import Prompt, blended_batch, full_batch, recomputed
from tools.reader.examples import Paragraphs, from_text, question_of, two_documents, writing_prompt
from tools.reader.llama import PROJECTIONS
from tools.reader.student import Student
from tools.reader.teach import divergence, learnt

VOCABULARY, WIDTH, INNER, LAYERS = 200, 96, 128, 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)
    return made


@pytest.fixture
def student(model, tmp_path):
    """With an adapter that changes nothing yet."""
    model.save_pretrained(tmp_path / "base")
    factors = {}
    for layer in range(LAYERS):
        for name in PROJECTIONS:
            weight = model.get_parameter(f"model.layers.{layer}.{name}.weight")
            factors[f"model.layers.{layer}.{name}.lora_A"] = torch.randn(4, weight.shape[1]) / 10
            factors[f"model.layers.{layer}.{name}.lora_B"] = torch.zeros(weight.shape[0], 4)
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter.safetensors")
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps({"rank": 4, "alpha": 4}))
    return Student(tmp_path / "base", tmp_path / "adapter", "cpu")


@pytest.fixture
def draw():
    return random.Random(0)


def tokens(draw, count):
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def prompt_of(draw, lengths=(24, 37, 20)):
    chunks = [tokens(draw, length) for length in lengths]
    return Prompt(tokens(draw, 5), chunks, tokens(draw, 1), tokens(draw, 7), tokens(draw, 3), [1])


def test_an_ordinary_prefill_is_transformers(model, student, draw):
    prompts = [prompt_of(draw), prompt_of(draw, (11, 12))]
    ids, wanted = full_batch(prompts, "cpu")

    mine = student.llama.full(student.projections(), ids, wanted)

    for row, prompt in enumerate(prompts):
        theirs = model(torch.tensor([prompt.ids()])).logits[0, list(prompt.wanted())]
        torch.testing.assert_close(mine[3 * row : 3 * row + 3], theirs, atol=2e-3, rtol=1e-3)


def test_everything_recomputed_is_an_ordinary_prefill_and_less_is_not(student, draw):
    prompts = [prompt_of(draw), prompt_of(draw, (11, 30))]
    full = student.llama.full(student.projections(), *full_batch(prompts, "cpu"))
    context = tokens(draw, 16)

    def away(ratio):
        flags = [recomputed(prompt, ratio, "spans", random.Random(0)) for prompt in prompts]
        made = blended_batch(prompts, flags, context, "cpu", torch.float32)
        return (student.llama.blended(student.projections(), made) - full).abs().max().item()

    assert away(1.0) < 2e-3
    assert away(0.0) > 0.5


def test_a_chunk_behind_what_it_really_stands_behind_is_exact(student, draw):
    prompt = prompt_of(draw, (30,))
    made = blended_batch([prompt], [[[False] * 30]], prompt.head, "cpu", torch.float32)

    blended = student.llama.blended(student.projections(), made)

    full = student.llama.full(student.projections(), *full_batch([prompt], "cpu"))
    torch.testing.assert_close(blended, full, atol=2e-3, rtol=1e-3)


def test_what_is_recomputed(draw):
    prompt = prompt_of(draw, (40, 64, 16))

    assert [sum(row) for row in recomputed(prompt, 0.25, "first", draw)] == [10, 16, 4]
    assert sum(map(sum, recomputed(prompt, 0.0, "spans", draw))) == 0
    evidence = recomputed(prompt, 0.5, "evidence", draw)
    assert sum(evidence[1]) >= 60
    assert 60 <= sum(map(sum, evidence)) <= 76


def test_the_student_comes_nearer_to_its_teacher_over_blended_chunks(student, draw):
    prompts = [prompt_of(draw) for _ in range(8)]
    context = tokens(draw, 16)
    with torch.no_grad():
        teacher = student.projections()
    optimizer = torch.optim.AdamW(student.factors.values(), lr=3e-3)

    def away():
        with torch.no_grad():
            truth = student.llama.full(teacher, *full_batch(prompts, "cpu")).log_softmax(-1)
            flags = [recomputed(prompt, 0.0, "spans", draw) for prompt in prompts]
            made = blended_batch(prompts, flags, context, "cpu", torch.float32)
            return divergence(truth, student.llama.blended(student.projections(), made), [3] * 8)[0].item()

    before = away()
    for _ in range(40):
        learnt(student, teacher, prompts, context, draw)
        optimizer.step()
        optimizer.zero_grad()

    assert away() < before / 2


def test_a_long_answer_counts_as_its_lengths_root():
    teacher = torch.log_softmax(torch.randn(10, 7), -1)
    student = torch.randn(10, 7)

    loss, means = divergence(teacher, student, [1, 9])

    each = (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(means, torch.stack([each[0], each[1:].mean()]))
    torch.testing.assert_close(loss, (each[0] + each[1:].sum() / 3) / 2)


def test_no_paragraph_of_the_evaluation_is_learnt_from(tmp_path):
    def row(name, texts, supporting):
        chunks = [{"title": "", "text": text} for text in texts]
        row = {"question": "Who built it?", "answers": ["Ada"], "kind": "single_hop", "chunks": chunks}
        (tmp_path / name).write_text(json.dumps({**row, "supporting": supporting}) + "\n")

    (tmp_path / "val").mkdir()
    row("val/squad_10.jsonl", ["kept out"], [0])
    row("squad_10.jsonl", ["kept out", "one " * 50, "two " * 50], [1])
    row("nq_20.jsonl", ["kept out", "three " * 50], [0])  # its evidence is: no question is left
    for name in ("musique_paragraphs", "hotpotqa", "musique_long_chunks", "mtrag_un"):
        (tmp_path / f"{name}.jsonl").write_text("")

    paragraphs = Paragraphs(tmp_path)

    (example,) = paragraphs.human()
    assert example.evidence == ["one " * 50]
    assert example.others == ["two " * 50]
    assert [chunk["text"][:3] for chunk, _ in paragraphs.about()] == ["one", "two"]


def test_what_counts_as_a_question(draw):
    chunk = {"title": "Oder", "text": "The Oder rises in the Czech Republic and flows through Poland to the sea."}

    assert writing_prompt(chunk, draw).endswith("Question:")
    assert writing_prompt({"title": "", "text": "nothing with a name in it at all"}, draw) is None
    asked = "Through which country does the river flow from the Czech Republic to Poland?"
    assert question_of(f" {asked} And more.\nText: other", chunk) == asked
    assert question_of(" Which of the following is Czech and in Poland?", chunk) is None
    assert question_of(" Who was the first president of a distant country?", chunk) is None
    assert question_of(" It flows through Poland.", chunk) is None


def test_what_is_asked_about_a_sentence_is_answered_by_it(draw):
    sentence = "The Oder rises in the Czech Republic and flows through western Poland to the Baltic."
    chunk = {"title": "Oder", "text": f"{sentence} Short one here. {'Wordwithoutanyspaces' * 3} of two."}

    asked = [from_text(chunk, ["beside"], draw) for _ in range(40)]

    for example in asked:
        assert example.answer
        if "[...]" in example.question:
            whole = example.question.split('"')[1].replace("[...]", example.answer)
        else:
            whole = f"{example.question.split(': ', 1)[1]} {example.answer}"
        assert whole == sentence
    assert len({example.question.split()[0] for example in asked}) == 2


def test_an_answer_that_needs_two_documents_is_in_neither_alone(draw):
    for _ in range(20):
        example = two_documents("First.", "Second.", ["other"], draw)
        first, second = example.evidence
        assert example.answer in second
        assert example.answer not in first
        named = [word for word in example.question.rstrip("?").split() if word[0].isupper()]
        assert not any(word in second for word in named[1:])
