"""Handles shared by configuration."""

import threading

from kvblend_rag import BlendConfig, KVBlend
from kvblend_rag.shared import release_handle, shared_handle


def config(path, **settings):
    return BlendConfig(model="m", store_path=str(path), **settings)


def test_one_handle_a_configuration(tmp_path):
    one, two = shared_handle(config(tmp_path)), shared_handle(config(tmp_path))
    other = shared_handle(config(tmp_path, chunk_size=128))
    assert one is two
    assert one is not other
    assert not release_handle(one)
    assert not one.closed
    assert release_handle(two)
    assert one.closed
    assert not release_handle(one)
    assert release_handle(other)


def test_a_handle_that_was_closed_is_made_anew(tmp_path):
    one = shared_handle(config(tmp_path))
    one.close()
    two = shared_handle(config(tmp_path))
    assert two is not one
    assert not release_handle(one)
    assert release_handle(two)


def test_handles_from_elsewhere_are_left_alone(tmp_path):
    own = KVBlend(config(tmp_path))
    assert not release_handle(own)
    assert not own.closed
    own.close()


def test_threads_get_the_same_handle(tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(shared_handle(config(tmp_path)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert [release_handle(each) for each in found] == [False] * 7 + [True]
