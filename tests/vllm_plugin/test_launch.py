"""Which connector a model is started with."""

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import AsyncEngineArgs

from kvblend_rag import BlendConfig
from kvblend_rag.vllm_plugin.launch import CONNECTOR, HYBRID_CONNECTOR, connector_arguments, fit_connector


def test_an_encoder_decoder_model_gets_no_connector(rigs, tmp_path, caplog):
    """vLLM would not start it with any."""
    arguments = AsyncEngineArgs(
        model=str(rigs.model("whisper")), **connector_arguments(BlendConfig(store_path=str(tmp_path)))
    )
    fit_connector(arguments)
    assert "ordinary prefill: it is an encoder-decoder model" in caplog.text
    assert arguments.create_engine_config().kv_transfer_config is None


@pytest.mark.parametrize(("family", "connector"), [("llama", CONNECTOR), ("lfm2", HYBRID_CONNECTOR)])
def test_a_hybrid_model_gets_the_connector_that_it_can_start_with(rigs, tmp_path, family, connector):
    """vLLM would not start it with the other."""
    arguments = AsyncEngineArgs(
        model=str(rigs.model(family)), **connector_arguments(BlendConfig(store_path=str(tmp_path)))
    )
    fit_connector(arguments)
    config = arguments.create_engine_config()
    assert config.kv_transfer_config.kv_connector == connector
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is (connector == CONNECTOR)
