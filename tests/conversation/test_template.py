"""Chat templates as models have them, rendered by Transformers."""

import json

import pytest

from kvblend_rag.conversation.template import ChatTemplate
from kvblend_rag.errors import ConfigError

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' }}# Tools\n"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.tool_calls %}<|im_start|>assistant\n{% for c in m.tool_calls %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
ESCAPING = QWEN.replace("{{ m.content }}\n</tool_response>", "{{ m.content | tojson }}\n</tool_response>")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
STRICT = "{% if messages | length > 1 %}{{ raise_exception('One message only') }}{% endif %}" + CHATML

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "Hi."}
CALL = {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "first\nsecond"}]}


@pytest.fixture(scope="module")
def template():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    def make(source):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
        tokenizer.chat_template = source
        return ChatTemplate(tokenizer)

    return make


@pytest.mark.parametrize(
    ("source", "knows", "escapes"), [(CHATML, False, False), (QWEN, True, False), (ESCAPING, True, True)]
)
def test_what_a_template_does_to_tools(template, source, knows, escapes):
    made = template(source)
    assert (made.knows_tools, made.escapes_tool_results) == (knows, escapes)


def test_native_tools_calls_and_results(template):
    text = template(QWEN).text([USER, CALLED, RESULT], [SEARCH])
    assert text.count('"search"') == 2
    assert '"arguments": {"q": "x"}' in text
    assert "<tool_response>\nfirst\nsecond\n" in text


def test_tools_are_made_up_for(template):
    system = {"role": "system", "content": "Be kind."}
    text = template(CHATML).text([system, USER, CALLED, RESULT, RESULT], [SEARCH])
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    assert json.dumps(SEARCH) in text
    assert '<tool_call>\n{"name": "search", "arguments": {"q": "x"}}\n</tool_call>' in text
    assert text.count("<|im_start|>user") == 2
    assert text.count("<tool_response>\nfirst\nsecond\n</tool_response>") == 2


def test_without_a_system_role_its_text_goes_to_the_user(template):
    text = template(NO_SYSTEM).text([{"role": "system", "content": "Be kind."}, USER])
    assert text.startswith("<|im_start|>user\nBe kind.\n\nHi.")


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (STRICT, [USER, USER], "One message only"),
        (None, [USER], "has no chat template"),
        (CHATML, [{"content": "x"}], "has no role"),
        (CHATML, [{"role": "user", "content": 3}], "content is int"),
        (CHATML, [{"role": "user", "content": [{"type": "image"}]}], "'image'"),
    ],
)
def test_what_can_not_be_rendered(template, source, messages, message):
    with pytest.raises(ConfigError, match=message):
        template(source).text(messages)


def test_arguments_that_are_not_json_stay_visible(template):
    call = {**CALL, "function": {"name": "search", "arguments": "{broken"}}
    assert "{broken" in template(QWEN).text([USER, {**CALLED, "tool_calls": [call]}])
