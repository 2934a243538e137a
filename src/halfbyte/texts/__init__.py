"""From texts to rows of tokens: reading files, the frames of named protocols, answers that a model writes itself."""
