"""The files of tenants: rows in the database, bytes in a directory, uploads streamed from one to the other."""
