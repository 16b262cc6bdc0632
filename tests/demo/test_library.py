import pytest

from kvblend_rag.demo.library import Document, load_documents
from kvblend_rag.errors import ConfigError


def test_markdown_is_split_at_headings(tmp_path):
    (tmp_path / "guide.md").write_text(
        "Before.\n\n# Guide\n\n## First use ##\n\nFill it.\n\n#### Detail\nSlowly.\n\n## Notes\n\nOne.\n"
        "\n```\n# a comment\n```\n\n## Notes\n\nTwo.\n"
    )
    assert load_documents(tmp_path) == [
        Document("guide.md#guide", "guide", "Before."),
        Document("guide.md#first-use", "First use", "Fill it.\n\n#### Detail\nSlowly."),
        Document("guide.md#notes", "Notes", "One.\n\n```\n# a comment\n```"),
        Document("guide.md#notes-2", "Notes", "Two."),
    ]


def test_text_files_are_read_whole_in_every_folder_but_hidden_ones(tmp_path):
    for name in ("b/c/note.txt", ".git/x.txt", "a.TXT", "page.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\ufeff# Not a heading\nText.\n", encoding="utf-8")
    documents = load_documents(tmp_path)
    assert [(d.id, d.title) for d in documents] == [("a.TXT", "a"), ("b/c/note.txt", "note")]
    assert documents[0].content == "a\n# Not a heading\nText."


def test_an_undecodable_file_is_skipped_with_a_warning(tmp_path):
    (tmp_path / "good.txt").write_text("Good.")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"latin\.txt: it is not UTF-8"):
        assert [document.id for document in load_documents(tmp_path)] == ["good.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "does not exist"), ("file.txt", "is a file, not a folder"), ("empty", "holds no text")],
)
def test_folders_that_can_not_be_used(tmp_path, name, message):
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "blank.md").write_text("# Only a heading\n")
    with pytest.raises(ConfigError, match=message):
        load_documents(tmp_path / name)


def test_the_bundled_documents_fit_the_demo(documents, reader):
    """Six of them make a prompt of well over a thousand tokens, and none is split when it is stored."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reader)
    lengths = {document.id: len(tokenizer(document.content).input_ids) for document in documents}
    assert 45 <= len(documents) <= 60
    assert len(lengths) == len(documents)
    assert {name: n for name, n in lengths.items() if not 190 <= n <= 256} == {}
    assert sum(lengths.values()) / len(lengths) > 200
