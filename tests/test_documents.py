"""DocumentSync and which_found, on an engine that stores token ids."""

import contextlib
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from kvblend_rag.documents import DocumentSync, which_found
from kvblend_rag.errors import KVBlendWarning, StoreFull
from kvblend_rag.testing import WordTokenizer, fake_kvblend

ONE = "The ferry to the northern island leaves at seven in the morning and returns at noon, except on Sundays."
TWO = "A lighthouse keeper records the weather every three hours and sends it to the harbour office by radio."
THREE = "Goats were brought to the island by monks, who made a soft cheese that is still sold at the market today."


@pytest.fixture
def kv(tmp_path):
    handle = fake_kvblend(store_path=tmp_path)
    yield handle
    handle.close()


def stored(kv):
    return kv.catalogue.stats()["chunks"]


def test_the_second_time_nothing_is_computed(kv):
    sync = DocumentSync(kv)
    assert sync.add(["1", "2"], [ONE, TWO]).computed == 2
    again = sync.add(["1", "2"], [ONE, TWO])
    assert (again.computed, again.present) == (0, 2)
    assert kv.engine.ingested == 2


def test_an_edited_document_lets_its_old_chunks_go(kv):
    sync = DocumentSync(kv)
    sync.add(["1"], [ONE])
    assert sync.update(["1"], [TWO]).computed == 1
    assert stored(kv) == 1
    assert kv.catalogue.documents()[0].chunks == 1


def test_several_texts_of_one_document(kv):
    sync = DocumentSync(kv, batch=1)
    sync.add(["1", "1"], [ONE, TWO])
    assert stored(kv) == 2
    sync.add(["1"], [TWO])
    assert stored(kv) == 1


def test_a_chunk_stays_while_another_document_holds_it(kv):
    sync = DocumentSync(kv)
    sync.add(["old"], [ONE])
    sync.add(["new"], [ONE])
    assert sync.delete(["old"]) == 0
    assert stored(kv) == 1
    assert sync.delete(["new"]) == 1
    assert stored(kv) == 0


def test_prefetch(kv):
    sync = DocumentSync(kv)
    sync.add(["1"], [ONE])
    assert sync.prefetch([ONE, "never ingested"]) == 1


def test_prefetch_starts_no_engine(tmp_path):
    from kvblend_rag import BlendConfig, KVBlend

    assert DocumentSync(KVBlend(BlendConfig(store_path=str(tmp_path)))).prefetch([ONE]) == 0


def test_prefetch_by_id_reads_no_text(kv, monkeypatch):
    sync = DocumentSync(kv, namespace="space")
    sync.add(["1", "2"], [ONE, TWO])
    kv.ingest([THREE], progress=False)
    assert sync.prefetch(ids=["1", "2", "unknown"]) == 2
    read = []
    encode = kv.engine.tokenizer.encode
    monkeypatch.setattr(kv.engine.tokenizer, "encode", lambda text, **more: read.append(text) or encode(text, **more))
    assert sync.prefetch([ONE, THREE], ids=["1", ""]) == 2
    assert read == [THREE]
    assert DocumentSync(kv, namespace="another").prefetch(ids=["1"]) == 0


def test_a_group_is_deleted_as_one(kv):
    sync = DocumentSync(kv)
    sync.add(["a1", "a2", "b1"], [ONE, TWO, THREE], groups=["a", "a", "b"])
    assert sync.delete(["a1"]) == 1
    sync.add(["a3"], [ONE], groups=["a"])
    assert DocumentSync(kv).delete(groups=["a"]) == 2  # another process's
    assert [document.document_id for document in kv.catalogue.documents()] == ["b1"]
    assert sync.delete(groups=["a", "unknown"]) == 0
    assert sync.clear() == 1


def test_namespaces_tell_ids_and_groups_apart(kv):
    plain, named = DocumentSync(kv), DocumentSync(kv, namespace="named")
    for sync in (plain, named):
        sync.add(["1"], [ONE], groups=["a"])
        sync.add(["alone"], [TWO])
    assert plain.clear() == 0
    assert named.delete(groups=["a"]) == 1
    assert named.clear() == 0
    assert stored(kv) == 1


@pytest.mark.parametrize("background", [False, True])
def test_what_is_deleted_later_and_added_again_is_not_computed_again(kv, background):
    with DocumentSync(kv, background=background, batch=1) as sync:
        sync.add(["1", "2"], [ONE, TWO], groups=["a", "a"])
        assert sync.delete(groups=["a"], later=True) is None
        sync.flush()
        assert stored(kv) == 0
        sync.add(["1", "2"], [ONE, TWO], groups=["a", "a"])
        sync.delete(groups=["a"], later=True)
        sync.add(["3", "2"], [ONE, THREE], groups=["a", "a"])  # edited: new ids or old ones, new texts or old ones
        sync.flush()
        assert kv.engine.ingested == 5
        assert {document.document_id for document in kv.catalogue.documents()} == {"2", "3"}
        assert stored(kv) == 2
        sync.delete(groups=["a"], later=True)
        sync.prefetch([])
        sync.flush()
    assert stored(kv) == 0


def test_deleting_starts_no_engine_and_frees_the_files(tmp_path, monkeypatch):
    from kvblend_rag import BlendConfig, KVBlend
    from kvblend_rag.store import StoredChunk, open_store

    def launch(config):
        raise AssertionError("deleting must not start an engine")

    monkeypatch.setattr("kvblend_rag.kvblend._launch", launch)
    config = BlendConfig(store_path=str(tmp_path), model="m")
    keys = [name * 32 for name in "ab"]
    with KVBlend(config) as kv, contextlib.closing(open_store(config)) as store:
        tokens = np.arange(20, dtype=np.int32)
        for key in keys:
            kv.catalogue.hold("1", [key])
            store.put(StoredChunk(key, "n", tokens, torch.zeros(1, 2, 20, 1, 4)))
            kv.catalogue.add(key, "n", tokens, 0, 1, 10)
        kv.catalogue.hold("2", keys[:1])
        assert DocumentSync(kv).delete(["1"]) == 1
        assert not kv.started
        assert kv.catalogue.missing(keys) == keys[1:]
        assert list(tmp_path.rglob(f"{keys[0]}*"))
        assert not list(tmp_path.rglob(f"{keys[1]}*"))


def test_background_keeps_the_order(kv):
    with DocumentSync(kv, background=True, batch=1) as sync:
        assert sync.add(["1", "2"], [ONE, TWO]) is None
        assert sync.delete(["1"]) is None
        sync.add(["2"], [THREE])
        report = sync.flush()
        assert (report.computed, report.chunks, sync.pending) == (3, 3, 0)
        assert sync.flush().chunks == 0
    assert [document.document_id for document in kv.catalogue.documents()] == ["2"]
    assert stored(kv) == 1


def test_a_full_queue_holds_the_caller_back(kv, monkeypatch):
    gate = threading.Event()
    original = kv.replace
    monkeypatch.setattr(kv, "replace", lambda *args, **kwargs: gate.wait(5) and original(*args, **kwargs))
    sync = DocumentSync(kv, background=True, batch=1, capacity=2)
    adding = threading.Thread(target=sync.add, args=(["1", "2", "3"], [ONE, TWO, THREE]))
    adding.start()
    time.sleep(0.1)
    assert adding.is_alive()
    assert sync.pending == 2
    gate.set()
    adding.join(5)
    assert sync.flush().computed == 3
    sync.close()


def test_background_errors_surface_once(kv, monkeypatch):
    def fail(*args, **kwargs):
        raise StoreFull("1 chunks could not be stored: no space left.")

    sync = DocumentSync(kv, background=True)
    with monkeypatch.context() as patched:
        patched.setattr(kv, "replace", fail)
        sync.add(["1"], [ONE])
        with pytest.raises(StoreFull, match="no space left"):
            sync.flush()
    sync.add(["1"], [ONE])
    assert sync.flush().computed == 1
    sync.close()
    sync.close()


def test_works_again_after_close(kv):
    sync = DocumentSync(kv, background=True)
    sync.add(["1"], [ONE])
    sync.close()
    sync.add(["2"], [TWO])
    assert sync.flush().computed == 1
    sync.close()


def test_adopt_goes_on_where_it_stopped(kv):
    documents = [("1", ONE), ("2", TWO), ("3", THREE), ("4", "too short")]

    def broken():
        yield from documents[:2]
        raise KeyboardInterrupt

    sync = DocumentSync(kv, batch=1)
    with pytest.raises(KeyboardInterrupt):
        sync.adopt(broken(), progress=False)
    report = sync.adopt(iter(documents), total=4, progress=False)
    assert (report.computed, report.present) == (2, 1)
    assert [index for index, _ in report.skipped] == [3]


def test_a_model_that_cannot_be_blended_is_warned_of_once(tmp_path):
    kv = fake_kvblend(store_path=tmp_path, refusal="it has no attention")
    sync = DocumentSync(kv)
    with pytest.warns(KVBlendWarning, match="it has no attention"):
        report = sync.add(["1"], [ONE])
    assert report.skipped == ((0, "it has no attention"),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sync.delete(["1"]) == 0
        assert sync.prefetch([ONE]) == 0


def found_in(kv, prompt, texts):
    result = kv.engine.run(_ask(kv, prompt))
    return which_found(kv, result.report, texts, result.prompt_token_ids)


async def _ask(kv, prompt):
    last = None
    async for output in kv.engine.generate(prompt, options={"tenant": ""}):
        last = output
    return last


@pytest.mark.parametrize("dummy_space", [False, True])
def test_which_were_found(tmp_path, dummy_space):
    kv = fake_kvblend(store_path=tmp_path, tokenizer=WordTokenizer(dummy_space=dummy_space))
    long = "\n".join([ONE, TWO])
    kv.ingest([ONE, THREE, long], progress=False)
    first, second, absent, missing, short = found_in(
        kv, f"Answer from this:\n\n{ONE}\n\n{TWO[:60]}", [ONE, long, THREE, TWO, "short"]
    )
    assert (first.found, first.reason) == ("fully", None)
    assert first.reused >= first.of - 2
    assert (second.found, second.reason) == ("partly", "cut by the splitter")
    assert (absent.found, absent.reason) == ("not", "not in the prompt")
    assert missing.reason == "not ingested"
    assert (short.found, short.reason) == ("not", "too short")


def test_escaped_text_is_named(kv):
    text = f"{ONE}\n{TWO}\n{THREE}"
    kv.ingest([text], progress=False)
    (use,) = found_in(kv, 'Result: "' + text.replace("\n", "\\n") + '"', [text])
    assert use.found in ("partly", "not")
    assert use.reason == "escaped by the chat template"


def test_what_the_prefix_cache_served_is_named(kv):
    kv.ingest([ONE], progress=False)
    prompt = f"Answer from this:\n\n{ONE}\n\n" + "Question and more words " * 8
    found_in(kv, prompt, [ONE])
    (use,) = found_in(kv, prompt, [ONE])
    assert (use.found, use.reason) == ("fully", "taken from the exact prefix cache")


def test_a_model_that_cannot_be_blended_finds_nothing(tmp_path):
    kv = fake_kvblend(store_path=tmp_path, refusal="it has no attention")
    (use,) = found_in(kv, ONE, [ONE])
    assert (use.found, use.reason) == ("not", "it has no attention")
