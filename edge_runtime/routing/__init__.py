"""Which tier answers a request: the owner's policy, what a request looks like, and the choice between tiers."""
