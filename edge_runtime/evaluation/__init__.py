"""How faithful one model is to another."""
