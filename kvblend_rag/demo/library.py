"""Documents from a folder of text and Markdown files; Markdown is split at its headings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvblend_rag.errors import ConfigError

BUNDLED = Path(__file__).parent / "documents"
"""The documents of Fennick Roasting Machines, a company that exists only here."""

_MARKDOWN = {".md", ".markdown"}
_SUFFIXES = {*_MARKDOWN, ".txt"}
# Deeper headings rarely begin a topic of their own and would make chunks too short to be reused.
_HEADING = re.compile(r" {0,3}#{1,3}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True)
class Document:
    """One retrievable piece of a file: a section of a Markdown file, or a whole text file."""

    id: str
    """The file's path in its folder, and for a section ``#`` and its heading: ``manual.md#first-use``."""
    title: str
    text: str

    @property
    def content(self) -> str:
        """What is stored and what stands in the prompt: the title, a line break, the text."""
        return f"{self.title}\n{self.text}"


def load_documents(folder: str | Path = BUNDLED) -> list[Document]:
    """Every ``.md``, ``.markdown`` and ``.txt`` file under a folder, in the order of their paths.

    Markdown is split at headings of level one to three; text before the first heading goes by the file's
    name, and a heading with no text of its own is left out. A long section stays whole. Hidden files and
    folders are passed over, and a file that can't be read as UTF-8 is skipped with a warning.

    Raises:
        ConfigError: there is no such folder, or nothing to read in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"The documents folder {folder} {what}.")
    documents = [document for file in text_files(folder) for document in _read(file, folder)]
    if not documents:
        raise ConfigError(f"The documents folder {folder} holds no text: .md and .txt files are read.")
    return documents


def text_files(folder: Path) -> Iterator[Path]:
    """The text and Markdown files under a folder, in the order of their paths; hidden ones are passed over."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.suffix.lower() in _SUFFIXES and file.is_file():
            yield file


def _read(file: Path, folder: Path) -> list[Document]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        warnings.warn(f"Skipped {file}: it is not UTF-8 text.", stacklevel=4)
        return []
    except OSError as error:
        warnings.warn(f"Skipped {file}: {error.strerror}.", stacklevel=4)
        return []
    return documents_in(file.relative_to(folder).as_posix(), text)


def documents_in(name: str, text: str) -> list[Document]:
    """The documents of one file.

    Args:
        name: its path in its folder.
        text: its content.
    """
    file = PurePosixPath(name)
    if file.suffix.lower() not in _MARKDOWN:
        return [Document(name, file.stem, text.strip())] if text.strip() else []
    return _with_ids(name, [(title or file.stem, body) for title, body in _sections(text) if body])


def _sections(markdown: str) -> Iterator[tuple[str, str]]:
    """Title and text of each section; the text before the first heading has an empty title."""
    title, lines, fence = "", list[str](), ""
    for line in markdown.splitlines():
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        heading = None if fence else _HEADING.match(line)
        if heading:
            yield title, "\n".join(lines).strip()
            title, lines = heading[1], []
        else:
            lines.append(line)
    yield title, "\n".join(lines).strip()


def _with_ids(name: str, sections: list[tuple[str, str]]) -> list[Document]:
    documents = []
    seen: dict[str, int] = {}
    for title, text in sections:
        anchor = "-".join(re.findall(r"\w+", title.lower()))
        seen[anchor] = seen.get(anchor, 0) + 1
        # Equal headings, such as two called "Notes", still get ids of their own.
        suffix = f"-{seen[anchor]}" if seen[anchor] > 1 else ""
        documents.append(Document(f"{name}#{anchor}{suffix}", title, text))
    return documents


__all__ = ["BUNDLED", "Document", "documents_in", "load_documents", "text_files"]
