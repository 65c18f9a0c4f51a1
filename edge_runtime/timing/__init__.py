"""How long a request takes here: what was measured of single requests, and a model of their times made of that."""
