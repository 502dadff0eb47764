"""Requests, what was said about their answers, and the newest of both by customization."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SEQ = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("seq", SEQ, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("at", sa.String(40), nullable=False),
        sa.Column("customization", sa.String(200), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("adapter_digest", sa.String(64), nullable=False),
        sa.Column("base_revision", sa.String(200), nullable=False),
        sa.Column("messages", sa.JSON, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("finish_reason", sa.String(20), nullable=True),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("latency_ms", sa.Double, nullable=False),
        sa.Column("first_token_ms", sa.Double, nullable=True),
        sa.Column("mean_logprob", sa.Double, nullable=True),
        sa.Column("metadata", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("requests_by_customization", "requests", ["customization", "seq"])
    op.create_index("requests_by_time", "requests", ["customization", "at"])
    op.create_table(
        "feedback",
        sa.Column("seq", SEQ, primary_key=True, autoincrement=True),
        sa.Column("request_id", sa.String(64), nullable=False, unique=True),
        sa.Column("at", sa.String(40), nullable=False),
        sa.Column("customization", sa.String(200), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("rating", sa.Integer, nullable=True),
        sa.Column("right_answer", sa.Text, nullable=True),
        sqlite_autoincrement=True,
    )
    op.create_index("feedback_by_customization", "feedback", ["customization", "seq"])
    op.create_table(
        "heads",
        sa.Column("customization", sa.String(200), primary_key=True),
        sa.Column("last_seq", SEQ, nullable=False),
        sa.Column("requests", SEQ, nullable=False),
        sa.Column("unlogged", SEQ, nullable=False),
        sa.Column("last_at", sa.String(40), nullable=True),
        sa.Column("last_feedback_seq", SEQ, nullable=False),
        sa.Column("labelled", SEQ, nullable=False),
    )
