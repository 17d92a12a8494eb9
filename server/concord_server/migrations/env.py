"""Alembic's entry: runs the steps on the connection that `Database` hands over."""

from alembic import context

from concord_server.database import all_tables

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=all_tables(), render_as_batch=True, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
if connection.in_transaction():
    connection.commit()
