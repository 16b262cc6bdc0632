"""Parsers of answers in a form. An answer that was cut is refused: LangChain's parsers would mend it, with what is
missing left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation


def _refuse_cut(result: Sequence[Generation]) -> None:
    message = result[0].message if result and isinstance(result[0], ChatGeneration) else None
    if message is not None and message.response_metadata.get("finish_reason") == "length":
        raise OutputParserException(
            f"The answer was cut before its form was complete: raise max_tokens. It was: {message.text!r}"
        )


class WholeJson(JsonOutputParser):
    """``JsonOutputParser`` of whole answers."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """See the class."""
        _refuse_cut(result)
        return super().parse_result(result, partial=partial)


class WholePydantic(PydanticOutputParser[Any]):
    """``PydanticOutputParser`` of whole answers."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """See the class."""
        _refuse_cut(result)
        return super().parse_result(result, partial=partial)


class WholeCall(JsonOutputKeyToolsParser):
    """``JsonOutputKeyToolsParser`` of whole answers."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """See the class."""
        _refuse_cut(result)
        return super().parse_result(result, partial=partial)


class WholePydanticCall(PydanticToolsParser):
    """``PydanticToolsParser`` of whole answers."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """See the class."""
        _refuse_cut(result)
        return super().parse_result(result, partial=partial)


__all__ = ["WholeCall", "WholeJson", "WholePydantic", "WholePydanticCall"]
