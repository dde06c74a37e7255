"""Floor 7: the frontend process: HTTP, tokenizer, request pool; and the engine process it looks after."""
