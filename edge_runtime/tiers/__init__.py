"""Where a request may be answered, and the choice between such places."""
