"""What the routes take and give, as OpenAPI describes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST_DOCUMENTS = 10_000
"""Documents a request; a larger feed comes in several."""

Id = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Tenant = Annotated[str, StringConstraints(max_length=1024)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Document(_Given):
    """A text, or the token ids that will stand in prompts."""

    id: Id = Field(description="Names the document, for replacing and deleting it.")
    text: str | None = Field(default=None, description="As it will stand in prompts.")
    token_ids: list[Token] | None = Field(default=None, description="In place of the text.")
    groups: list[Id] = Field(default_factory=list, description="What a deletion may name to delete several at once.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Document:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("a document holds either `text` or `token_ids`")
        return self


class IngestRequest(_Given):
    """Documents whose KV is to be computed and stored."""

    documents: list[Document] = Field(min_length=1, max_length=MOST_DOCUMENTS)
    tenant: Tenant = Field(default="", description="Whose they are; invisible to all others.")
    replace: bool = Field(default=True, description="Let go of chunks that only a document's older text had.")


class Skipped(BaseModel):
    """A document that was not ingested, or not all of it."""

    id: str
    reason: str


class Job(BaseModel):
    """An ingest on its way."""

    id: str
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    tenant: str
    documents: int = Field(description="How many were given.")
    documents_done: int = 0
    chunks: int = Field(default=0, description="Chunks of the documents that are done.")
    computed: int = Field(default=0, description="Of these, computed now.")
    present: int = Field(default=0, description="Of these, stored already.")
    tokens: int = Field(default=0, description="Tokens computed.")
    seconds: float = Field(default=0.0, description="Time it has been running.")
    skipped: list[Skipped] = Field(default_factory=list)
    error: str | None = Field(default=None, description="Why it failed, in one sentence.")


class DeleteRequest(_Given):
    """Documents to forget."""

    ids: list[Id] = Field(default_factory=list, max_length=MOST_DOCUMENTS)
    groups: list[Id] = Field(default_factory=list, max_length=MOST_DOCUMENTS, description="All their documents.")
    tenant: Tenant = ""


class Deleted(BaseModel):
    """What went."""

    chunks: int = Field(description="Chunks that no other document holds, and that were deleted.")


class PrefetchRequest(_Given):
    """Chunks to bring into the fastest tier before a prompt asks for them."""

    texts: list[str] = Field(default_factory=list, max_length=MOST_DOCUMENTS, description="As they were ingested.")
    documents: list[Id] = Field(default_factory=list, max_length=MOST_DOCUMENTS, description="Ids.")
    chunks: list[Id] = Field(default_factory=list, max_length=MOST_DOCUMENTS, description="Keys, as in a report.")
    tenant: Tenant = ""


class Prefetched(BaseModel):
    """What stands ready."""

    chunks: int = Field(description="How many of the chunks are in the fastest tier now.")


class Membership(_Given):
    """What is asked of documents and groups, and which are put into groups."""

    ids: list[Id] = Field(default_factory=list, max_length=MOST_DOCUMENTS)
    groups: list[str] = Field(default_factory=list, max_length=MOST_DOCUMENTS)
    group_prefix: str | None = Field(default=None, description="Documents of all groups that begin so.")
    missing: list[Id] = Field(default_factory=list, max_length=MOST_DOCUMENTS, description="Keys of chunks.")
    join: list[tuple[Id, Id]] = Field(
        default_factory=list, max_length=MOST_DOCUMENTS, description="Put documents into groups first: group and id."
    )
    tenant: Tenant = ""


class Members(BaseModel):
    """What is known of documents and groups."""

    chunks: dict[str, list[str]] = Field(description="By id: keys of the chunks that a document holds.")
    members: list[str] = Field(description="Ids of the documents in the groups.")
    missing: list[str] = Field(description="Keys that are not stored.")


class Tier(BaseModel):
    """One tier of the store, of the first rank."""

    tier: str
    bytes: int


class Stats(BaseModel):
    """What the store holds."""

    chunks: int
    tokens: int
    bytes: int
    documents: int = Field(description="Of the tenant.")
    tiers: list[Tier]
    jobs: int = Field(description="Ingest jobs that wait or run.")
    learned: int = Field(description="Chunks that this server has learned from prompts since it started.")


class Info(BaseModel):
    """What the server runs, and how it blends."""

    model: str
    served_as: str
    max_model_len: int
    dtype: str
    device: str
    version: str
    fingerprint: str
    context: list[int] = Field(description="Token ids of the ingest context.")
    header: list[int] | None = Field(description="Token ids that openings are computed behind, if there are any.")
    refusal: str | None = Field(description="Why this model can't be blended.")
    verdict: dict[str, Any] | None = Field(description="What calibration found out, if anybody calibrated.")
    architectures: list[str]
    chat_template: str
    settings: dict[str, Any] = Field(description="Defaults of blending, which a request may override, and chunk size.")


class Problem(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    code: int


class ErrorAnswer(BaseModel):
    """As OpenAI's API answers an error."""

    error: Problem


__all__ = [
    "MOST_DOCUMENTS",
    "DeleteRequest",
    "Deleted",
    "Document",
    "ErrorAnswer",
    "Info",
    "IngestRequest",
    "Job",
    "Members",
    "Membership",
    "PrefetchRequest",
    "Prefetched",
    "Problem",
    "Skipped",
    "Stats",
    "Tier",
]
