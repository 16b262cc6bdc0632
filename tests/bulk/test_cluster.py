"""``kvblend ingest --ray … --ray-address``: a cluster that somebody else started, here on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvblend_rag.bulk.data_set import DataSet
from kvblend_rag.bulk.feed import Columns
from kvblend_rag.bulk.run import Fleet, ingest
from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.testing import fake_kvblend

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

TEXT = "The ferry leaves the northern pier at six in the morning and comes back in the evening of the same day. "


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def address():
    """Of a cluster with one host, until the test ends."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=4", f"--object-store-memory={100 << 20}", "--include-dashboard=false"]
    head = subprocess.Popen(
        [*command, "--disable-usage-stats"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with socket.socket() as known:
            if known.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert head.poll() is None, "the cluster's head ended"
        time.sleep(0.5)
    yield f"127.0.0.1:{port}"
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(60)


def test_a_cluster_by_its_address(address, tmp_path):
    config = BlendConfig(store_path=str(tmp_path / "store"), model="fake-model")
    file = tmp_path / "feed.jsonl"
    file.write_text("\n".join(json.dumps({"id": f"d{number}", "text": f"{TEXT}{number}"}) for number in range(9)))

    def run(fleet):
        data_set, letters = DataSet.at(str(file), Columns(), None), tmp_path / "dead.jsonl"
        return list(ingest(data_set, config, fleet, letters, lambda given: fake_kvblend(store_path=given.store_path)))

    steps = run(Fleet(engines=2, batch=4, address=address))
    assert (steps[-1].stored, steps[-1].computed, steps[-1].failed) == (9, 9, 0)
    again = run(Fleet(engines=1, batch=4, address=address))
    assert (again[-1].stored, again[-1].computed) == (9, 0)
    with pytest.raises(ConfigError, match="check --ray-address"):
        run(Fleet(engines=1, batch=4, address=f"127.0.0.1:{free_port()}"))
