"""The public fake engine and its tokenizer."""

import os
import subprocess
import sys

import pytest

from kvblend_rag import BlendConfig, KVBlend
from kvblend_rag.chat import Chat
from kvblend_rag.errors import ConfigError, EngineUnavailable, StoreError
from kvblend_rag.testing import FakeEngine, WordTokenizer, fake_kvblend

TEXT = "A lighthouse keeper records the weather every three hours and sends it to the harbour office by radio."
HI = [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize("text", ["Hello there, you.\n\nBye!", " two  spaces", "a\tb\n", "", "ünï → 漢字 <|im_end|>"])
def test_tokenizer_round_trip(text):
    tokenizer = WordTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    dummy = WordTokenizer(dummy_space=True)
    assert dummy.decode(dummy.encode(text)) == text


def test_a_chunks_ends_differ_in_context():
    tokenizer = WordTokenizer()
    assert tokenizer.encode("Word. Next.\n\n")[-1] != tokenizer.encode("Word. Next.")[-1]
    assert WordTokenizer(dummy_space=True).encode("Word")[0] == tokenizer.encode(" Word")[0]


def test_ids_are_the_same_in_every_process():
    script = "from kvblend_rag.testing import WordTokenizer; print(WordTokenizer().encode('a b.'))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == str(WordTokenizer().encode("a b."))


def test_it_needs_no_vllm():
    script = (
        "import sys; sys.modules['vllm'] = None\n"
        "from kvblend_rag.testing import fake_kvblend\nfrom kvblend_rag.chat import Chat\nimport tempfile\n"
        "kv = fake_kvblend('Yes.', store_path=tempfile.mkdtemp())\n"
        f"kv.ingest([{TEXT!r}], progress=False)\n"
        "print(Chat(kv).complete_sync([{'role': 'user', 'content': 'Hi.'}]).text)\nkv.close()"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "Yes.", out.stderr


def test_chunks_outlive_the_engine(tmp_path):
    with fake_kvblend(store_path=tmp_path) as kv:
        kv.ingest([TEXT], progress=False)
    with fake_kvblend(store_path=tmp_path) as kv:
        assert kv.ingest([TEXT], progress=False).present == 1
        result = Chat(kv).complete_text_sync(f"Read:\n\n{TEXT}\n\nQuestion?")
        report = result.report
        assert report.blended
        assert report.reused_tokens + report.computed_tokens + report.cached_tokens == report.prompt_tokens
        kv.engine.run(kv.engine.reset_prefix_cache())
        off = Chat(kv).complete_text_sync(f"Read:\n\n{TEXT}\n\nQuestion?", blend={"blend": False})
        assert off.usage.cache_read == 0


def test_tenants_do_not_see_each_other(tmp_path):
    with fake_kvblend(store_path=tmp_path, config={"tenant": "a"}) as kv:
        kv.ingest([TEXT], progress=False)
        assert Chat(kv).complete_text_sync(TEXT).report.blended
    with fake_kvblend(store_path=tmp_path, config={"tenant": "b"}) as kv:
        assert not Chat(kv).complete_text_sync(TEXT).report.blended


def test_without_a_store_ingest_says_so(tmp_path):
    kv = KVBlend(BlendConfig(store_path=str(tmp_path)), FakeEngine())
    with pytest.raises(StoreError, match="give it a store_path"):
        kv.ingest([TEXT], progress=False)
    kv.close()


def test_a_closed_engine_says_so():
    engine = FakeEngine()
    engine.close()
    engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        engine.generate("x")


def test_no_answers_is_an_error():
    with pytest.raises(ConfigError, match="at least one answer"):
        FakeEngine([])


def test_unknown_maintenance_is_an_error():
    engine = FakeEngine()
    with pytest.raises(ConfigError, match="no method 'explode'"):
        engine.run(engine.call("explode"))
    assert engine.calls == [("explode", ())]
    engine.close()


async def test_outputs_are_cumulative_by_default():
    engine = FakeEngine("a b c")
    texts = [output.outputs[0].text async for output in engine.generate("x")]
    assert texts == ["a", "a b", "a b c"]
    engine.close()
