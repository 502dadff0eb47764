"""Runs the migrations on the connection that `ml_assets.traffic.store` hands over, in its transaction."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    transactional_ddl=True,  # SQLite's too: the store begins its transactions itself
)
with context.begin_transaction():
    context.run_migrations()
