import numpy as np
import pytest

from kvblend_rag.blend.context import COMPANION_TOKENS, CONTEXT_TOKENS, beside, ingest_context, own_documents
from kvblend_rag.errors import ConfigError


class Words:
    """A tokenizer of one token a word; each line end is one too."""

    bos_token_id, bos_token = 1, "<s>"
    chat_template = "given"

    def __init__(self):
        self.vocabulary = {"<s>": 1}

    def encode(self, text, add_special_tokens=True):
        words = text.replace("\n", " ⏎ ").replace("<s>", "<s> ").split()
        return [self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in words]

    def decode(self, tokens):
        names = {number: word for word, number in self.vocabulary.items()}
        return " ".join(names[token] for token in tokens)

    def apply_chat_template(self, conversation, tokenize, add_generation_prompt):
        lines = [f"<{turn['role']}> {turn['content']}" for turn in conversation]
        return "\n".join(["<s>", *lines, "<assistant>"])


class NoSystemRole(Words):
    def apply_chat_template(self, conversation, **options):
        if conversation[0]["role"] == "system":
            raise RuntimeError("System role not supported")
        return super().apply_chat_template(conversation, **options)


class NoTemplate(Words):
    chat_template = None


def test_nothing_and_the_first_special_token():
    assert ingest_context("none", Words()) == []
    assert ingest_context("bos", Words()) == [1]


def test_a_tokenizer_without_a_first_special_token():
    tokenizer = Words()
    tokenizer.bos_token_id = tokenizer.bos_token = None
    assert ingest_context("bos", tokenizer) == []
    assert len(ingest_context("document", tokenizer)) == CONTEXT_TOKENS


def test_the_header_ends_where_the_users_text_would_begin():
    tokenizer = Words()
    header = tokenizer.decode(ingest_context("header", tokenizer, "Be brief."))
    assert header == "<s> ⏎ <system> Be brief. ⏎ <user>"


def test_a_template_without_a_system_role_gets_it_in_the_users_turn():
    tokenizer = NoSystemRole()
    assert tokenizer.decode(ingest_context("header", tokenizer, "Be brief.")) == "<s> ⏎ <user> Be brief. ⏎ ⏎"


def test_a_model_without_a_template():
    tokenizer = NoTemplate()
    assert tokenizer.decode(ingest_context("header", tokenizer, "Be brief.")) == "<s> Be brief. ⏎ ⏎"
    assert ingest_context("header", NoTemplate()) == [1]


def test_the_document_context_fills_whole_blocks_and_starts_with_the_header():
    tokenizer = Words()
    header = ingest_context("header", tokenizer)
    context = ingest_context("document", tokenizer)
    assert len(context) == CONTEXT_TOKENS
    assert context[: len(header)] == header
    assert tokenizer.decode(context[-2:]) == "⏎ ⏎"


def test_the_long_context_holds_three_documents_and_ends_as_the_short_one_does():
    tokenizer = Words()
    header = ingest_context("header", tokenizer)
    context, short = ingest_context("long", tokenizer), ingest_context("document", tokenizer)
    assert len(context) % CONTEXT_TOKENS == 0
    assert len(context) >= 2 * CONTEXT_TOKENS
    assert context[: len(header)] == header
    assert context[-100:] == short[-100:]
    text = tokenizer.decode(context)
    assert all(some in text for some in ("A lighthouse warns ships", "A map shows roads", "A mill grinds grain"))


OWN = tuple(
    " ".join(f"{name}{i}" for i in range(count)) for name, count in (("a", 90), ("b", 2000), ("c", 90), ("d", 9))
)


def test_the_applications_own_documents_stand_in_place_of_the_generic_ones():
    tokenizer = Words()
    long = ingest_context("long", tokenizer, documents=OWN)
    assert len(long) == len(ingest_context("long", tokenizer))
    text = tokenizer.decode(long)
    assert text.endswith("b255 ⏎ ⏎ c0 " + " ".join(f"c{i}" for i in range(1, 90)) + " ⏎ ⏎")
    assert " d0 " not in text
    assert "lighthouse" not in text
    short = tokenizer.decode(ingest_context("document", tokenizer, documents=OWN))
    assert short.endswith(" a88 a89 ⏎ ⏎")
    assert "b0" not in short


def test_own_documents_are_read_in_their_order_or_named_in_one_sentence(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"\n{name} " + "word " * 40)
    (tmp_path / "short").write_text("A few words.")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 100)
    texts = own_documents([str(tmp_path / "two"), str(tmp_path / "one")])
    assert [text.split()[0] for text in texts] == ["two", "one"]
    for name, what in (("short", "has 12 letters"), ("binary", "can't be read as text"), ("none", "can't be read")):
        with pytest.raises(ConfigError, match=what):
            own_documents([str(tmp_path / name)])


@pytest.mark.parametrize("words", [1, 100, 130, 300, 1000])
def test_a_long_system_text_leaves_half_a_context_of_document(words):
    tokenizer = Words()
    system = " ".join(f"word{i}" for i in range(words))
    header = ingest_context("header", tokenizer, system)
    context = ingest_context("document", tokenizer, system)
    assert len(context) % CONTEXT_TOKENS == 0
    assert len(context) - len(header) >= CONTEXT_TOKENS // 2
    assert context[: len(header)] == header


@pytest.mark.parametrize("documents", [(), OWN, OWN[:1]], ids=["generic", "own", "one"])
def test_the_similar_context_is_as_long_and_ends_in_a_document(documents):
    tokenizer = Words()
    context = ingest_context("similar", tokenizer, documents=documents)
    long = ingest_context("long", tokenizer, documents=documents)
    assert len(context) == max(len(long), 2 * CONTEXT_TOKENS)
    assert context != long, "their chunks would have the same keys"
    assert context[: len(ingest_context("header", tokenizer))] == ingest_context("header", tokenizer)
    assert tokenizer.decode(context[-2:]) == "⏎ ⏎"
    assert tokenizer.decode(context[:-COMPANION_TOKENS][-2:]) == "⏎ ⏎"


@pytest.mark.parametrize("tokens", [1, 100, COMPANION_TOKENS - 3, COMPANION_TOKENS - 2, 1000])
def test_a_companion_stands_in_place_of_the_last_document(tokens):
    tokenizer = Words()
    context, separator = ingest_context("similar", tokenizer), tokenizer.encode("\n\n")
    companion = np.arange(5000, 5000 + tokens, dtype=np.int32)
    found = beside(context, companion, separator)
    assert found.dtype == np.int32
    kept = min(tokens, COMPANION_TOKENS - len(separator))
    filler = COMPANION_TOKENS - kept - len(separator)
    assert found[:-COMPANION_TOKENS].tolist() == context[:-COMPANION_TOKENS]
    assert found[-COMPANION_TOKENS:].tolist() == [
        *context[len(context) - filler :],
        *companion[:kept],
        *separator,
    ]
