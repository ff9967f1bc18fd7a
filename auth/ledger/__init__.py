"""The bill: what every request used, written down so that no end of a request or of a process loses or doubles it."""
