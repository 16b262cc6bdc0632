import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvblend_rag.demo.library import Document, load_documents
from kvblend_rag.demo.reader import prepare_reader


def no_network(*_args: object) -> None:
    raise AssertionError("the demo must not use the network")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    yield folder
    shutil.rmtree(folder)  # a quarter of a gigabyte; pytest would keep three of them


@pytest.fixture(scope="session")
def reader(cache_dir: Path) -> Path:
    """The reader, built once for all tests (about 20 s), with the network off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        return prepare_reader(cache_dir)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return load_documents()
