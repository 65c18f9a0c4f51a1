"""Parts of a request's way that can be added, replaced or left out: small classes, found by entry points."""
