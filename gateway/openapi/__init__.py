"""The description of every route: made from the routes there are and the structs they decode and encode."""
