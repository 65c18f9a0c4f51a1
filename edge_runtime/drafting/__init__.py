"""What may come next, guessed, so that one step of the model checks several tokens: from what was said before
(:mod:`.prompt_lookup`) or by a smaller model (:mod:`.draft_model`), where that pays (:mod:`.pace`)."""
