"""Where a request's time goes: spans, the ring that keeps them, and how others read them."""
