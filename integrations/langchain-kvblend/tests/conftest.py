"""Engines that answer by a script, and the bundled reader on the real one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvblend_rag import KVBlend
from kvblend_rag.testing import FakeEngine, FakeRequest, fake_kvblend


@pytest.fixture(autouse=True)
def nobodys_caches() -> Iterator[None]:
    from langchain_core.globals import set_llm_cache

    yield
    set_llm_cache(None)


@pytest.fixture
def make_kv(tmp_path: Path) -> Iterator[Callable[..., KVBlend]]:
    """``make_kv(answers, ...)``: a KVBlend over a FakeEngine, with a store of its own."""
    made: list[KVBlend] = []

    def make(answers: Any = "Answer.", **options: Any) -> KVBlend:
        options.setdefault("store_path", tmp_path / f"store-{len(made)}")
        made.append(fake_kvblend(answers, **options))
        return made[-1]

    yield make
    for kv in made:
        kv.close()


@pytest.fixture
def kv(make_kv: Callable[..., KVBlend]) -> KVBlend:
    return make_kv()


def engine_of(kv: KVBlend) -> FakeEngine:
    engine = kv.engine
    assert isinstance(engine, FakeEngine)
    return engine


@pytest.fixture
def engine(kv: KVBlend) -> FakeEngine:
    return engine_of(kv)


@pytest.fixture(scope="session")
def reader_kv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVBlend]:
    """The bundled reader (or ``KVBLEND_TEST_MODEL``) in vLLM; about half a minute to start."""
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvblend_rag.demo.reader import prepare_reader

    model = os.environ.get("KVBLEND_TEST_MODEL") or prepare_reader(progress=False)
    kv = KVBlend.from_config(
        model=str(model),
        store_path=str(tmp_path_factory.mktemp("reader-store")),
        planner=False,  # prompts are short here, and what is tested is the blend
        engine_args={
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 1 << 28,
            # A very small model may write spaces without an end where a form allows them.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        },
    )
    yield kv
    kv.close()


def call(name: str, /, **arguments: Any) -> str:
    """A tool call as a model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def last_user_text(request: FakeRequest) -> str:
    """The last turn that is not the assistant's."""
    return request.prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]


def accepted(request: FakeRequest, answer: str) -> str:
    """An answer, when the form that vLLM was to constrain it to accepts it: a script can't cheat."""
    form = request.params.structured_outputs
    if form is not None:
        import xgrammar

        if form.structural_tag:
            grammar = xgrammar.Grammar.from_structural_tag(form.structural_tag)
        elif form.json_object:
            grammar = xgrammar.Grammar.builtin_json_grammar()
        else:
            grammar = xgrammar.Grammar.from_json_schema(form.json)
        assert xgrammar.testing._is_grammar_accept_string(grammar, answer), f"{form} does not accept {answer!r}"
    return answer


def competent(request: FakeRequest) -> str:
    """What a competent model would answer to the standard tests that need one."""
    asked = last_user_text(request)
    if "<tool_response>" in asked:
        return "It is sunny in San Francisco."
    if "magic_function_no_args" in asked:
        return accepted(request, call("magic_function_no_args"))
    if "magic_function(3)" in asked:
        return accepted(request, call("magic_function", input=3))
    if "Pirate" in asked:
        return accepted(request, call("greeting_generator", answer_style="Pirate"))
    if "weather in San Francisco" in asked:
        return accepted(request, call("get_weather", location="San Francisco, CA"))
    if asked == "Hello!" and request.params.structured_outputs is not None:
        return accepted(request, call("magic_function", input=3))
    if "joke about cats" in asked:
        joke = {"setup": "Why do cats sit on keyboards?", "punchline": "To watch the mouse."}
        return accepted(request, json.dumps(joke))
    for customer in ("你好啊集团", "こんにちは株式会社"):
        if customer in asked:
            return accepted(request, call("unicode_customer", customer_name=customer, description="technology"))
    return "Hello."


@pytest.fixture(scope="session")
def competent_kv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVBlend]:
    """A scripted engine whose output goes through vLLM's own parsers."""
    kv = fake_kvblend(competent, store_path=tmp_path_factory.mktemp("scripted"), parsers="vllm")
    yield kv
    kv.close()


@pytest.fixture
def words() -> Callable[[str, int], str]:
    """``words(seed, count)``: a text of that many words, sentences and all."""

    def make(seed: str, count: int = 60) -> str:
        all_words = [f"{seed}{place * 7 % 101}" + (".\n" if place % 12 == 11 else "") for place in range(count)]
        return " ".join(all_words).replace("\n ", "\n") + "."

    return make
