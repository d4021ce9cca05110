"""How the bundled model is made: generated documents, tokenizer, training, export. See README.md beside this file."""
